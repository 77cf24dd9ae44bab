"""Classification of texts along a label tree: Text2Tree, or one of the methods it is compared with.

When to stop and at which threshold a label is given is chosen on the development part; the test part is read once, at
the end. Beside the model stands TF-IDF with logistic regression on the same texts.
"""

import dataclasses
import functools
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxmodels.errors import UserError
from jaxmodels.text2tree import baselines
from jaxmodels.text2tree.classifier import Text2Tree, Text2TreeConfig, predictions
from jaxmodels.text2tree.hiagm import prior
from jaxmodels.text2tree.hlr import label_rows
from jaxmodels.text2tree.losses import LossConfig
from jaxmodels.text2tree.tree import LabelTree
from train import experiment, text_floors, text_metrics
from train.data import records
from train.data.coded_texts import CodedTexts, Columns, coded_texts
from train.experiment import DATA
from train.objectives.coded_texts import OVER_NODES, CodedTextsObjective, loss_config
from train.optimizers import make_optimizer, make_schedule, scaled
from train.predict import Predictions
from train.runtime import loop
from train.runtime.config import config_hash, from_dict
from train.runtime.files import load_npz, read_json, save_npz, write_json
from train.runtime.mesh import check_batch, make_mesh
from train.runtime.run_folder import RESULTS, RunFolder
from train.runtime.state import Blueprint, State, blueprint
from train.runtime.step import TrainStep
from train.text2tree_config import METHODS, OURS, Text2TreeRun, TextEncoderConfig
from train.text_labels import examples, label_states, tree_arrays, tree_from
from train.text_pretrain import pretrain
from train.text_reader import Reader, fingerprint, make_reader

SPLITS = ("train", "dev", "test")
CHOSEN_BY = "dev_macro_f1"
ENCODER = "encoder.sha256"  # in the results: `text_reader.fingerprint`


@dataclasses.dataclass(frozen=True)
class Trial:
    """A classifier before training, and what it needs. cfg: with the steps that the epochs make."""

    cfg: Text2TreeRun
    folder: RunFolder
    source: CodedTexts
    data: Path
    start: Text2Tree
    best: "Best"
    task: loop.Task
    mesh: Mesh


def run(cfg: Text2TreeRun, folder: RunFolder) -> None:
    """Trains or finishes one classifier in a run folder."""
    if folder.results().get("finished") and has_changed(cfg, folder):
        tell(f"{cfg.data.name} has changed since {folder.dir} was trained with it, whose results stay as they are; "
             "train again in another folder")
    experiment.run(cfg, folder, prepare, finish)
    drop_checkpoints(cfg, folder)


def run_together(cfgs: Sequence[Text2TreeRun], folders: Sequence[RunFolder]) -> list[Exception | None]:
    """`run` of classifiers that differ in their seeds, trained in lockstep: see `experiment.run_together`."""
    ends = experiment.run_together(cfgs, folders, prepare, finish)
    for cfg, folder in zip(cfgs, folders, strict=True):
        drop_checkpoints(cfg, folder)
    return ends


def prepare(cfg: Text2TreeRun, folder: RunFolder) -> Trial:
    """Everything before the training."""
    experiment.check_epochs(cfg)
    mesh = make_mesh(cfg.mesh)
    check_batch(cfg.data.batch, cfg.loop.accumulate, mesh)
    source = read(cfg)
    experiment.check_data(folder, source.digest, f"texts or codes of {cfg.data.name}")
    check_encoder(cfg, folder.dir)
    start = pretrain(cfg, folder, source, mesh) if cfg.encoder.name == "fresh" else None
    reader = make_reader(cfg.encoder, source.parts["train"].texts, cfg.seed, folder.dir, start)
    if now := fingerprint(cfg.encoder):
        folder.write_results({ENCODER: now})
    folder.write_results({f"data.{name}": value for name, value in source.counts.items()}
                         | {"data.multi_label": source.multi_label, DATA: source.digest})
    if folder.writes:
        for line in source.warnings():
            tell(f"{cfg.data.name}: {line}")
    folder.save_npz("classes", **tree_arrays(source.tree), multi_label=source.multi_label)
    data = prepare_data(cfg, folder, source, reader, start)
    return plan_training(cfg, folder, source, reader, data, mesh)


def finish(trial: Trial, trained: loop.Trained) -> None:
    """Everything after it: the scores of the model that was best on the development part."""
    cfg, folder = trial.cfg, trial.folder
    best = trial.best.step(trained.step)
    folder.write_results(experiment.run_numbers(trained, trained.state["params"], trial.task.tokens, 0.0)
                         | {"epochs": trained.step / cfg.loop.evaluate_every, "method": cfg.method.name})
    model = restored(trial.start, folder.dir)
    if jax.process_index() == 0:
        found = numbers(cfg, folder, trial.source, trial.data, model)
        folder.write_results(found | {"chosen_step": best, "finished": True})


def drop_checkpoints(cfg: Text2TreeRun, folder: RunFolder) -> None:
    """Of a run at its end, which nobody asks for any more: up to a gigabyte, and a sweep has dozens of runs."""
    if folder.writes and folder.results().get("finished") and (folder.dir / "model.npz").exists():
        shutil.rmtree(folder.dir / "checkpoints", ignore_errors=True)
        if cfg.loop.local_dir:
            shutil.rmtree(loop.local_folder(folder, cfg.loop.local_dir), ignore_errors=True)


def read(cfg: Text2TreeRun) -> CodedTexts:
    """The texts. Raises UserError for a method that the kind of labels does not allow."""
    data = cfg.data
    source = coded_texts(data.name, floor=data.floor, columns=Columns(data.text, data.labels, data.split),
                         tree=data.tree, limit=data.limit)
    multi = {"oversampling": False, "db": True}.get(cfg.method.name, source.multi_label)
    if multi != source.multi_label:
        raise UserError(f"method.name={cfg.method.name} is for texts with {'several codes' if multi else 'one code'}, "
                        f"which those of {data.name} are not; choose another of {', '.join(METHODS)}")
    if len(source.parts["train"]) < data.batch:
        raise UserError(f"data.batch={data.batch} is more than the {len(source.parts['train'])} training texts; lower "
                        "it")
    return source


def has_changed(cfg: Text2TreeRun, folder: RunFolder) -> bool:
    """Whether the CSV of a finished run is there still, and is another one."""
    known = folder.results().get(DATA)
    if not (known and cfg.data.path and Path(cfg.data.path).expanduser().is_file()):
        return False
    try:
        return read(cfg).digest != known
    except UserError:
        return True


@functools.cache  # of the trials of a sweep the first tells
def tell(line: str) -> None:
    print(line, file=sys.stderr)


def check_encoder(cfg: Text2TreeRun, folder: Path) -> None:
    """Raises UserError if the encoder's files, of which a run lacks a copy, are others than those it was trained with.

    Runs of versions that recorded nothing pass.
    """
    known = (read_json(folder / RESULTS) or {}).get(ENCODER)
    if known and known != (now := fingerprint(cfg.encoder)):
        raise UserError(f"the files of encoder.name={cfg.encoder.name} have changed since {folder} was trained with "
                        f"them (SHA-256 {known[:12]}, now {now[:12]}); put the old ones back, or train again in "
                        "another folder")


def what_is_read(cfg: Text2TreeRun, source: CodedTexts) -> dict[str, Any]:
    """On what inputs and TF-IDF depend: other texts may lie under the same name."""
    return dataclasses.asdict(cfg.data) | {"texts": source.digest}


def prepare_data(cfg: Text2TreeRun, folder: RunFolder, source: CodedTexts, reader: Reader, start: Path | None = None
                 ) -> Path:
    """Inputs and labels of every part, in a ``data-*`` folder of the run (or its sweep); frozen layers run once.

    start: the pre-trained encoder, whose pieces the inputs are.
    """
    about = {"data": what_is_read(cfg, source), "encoder": cfg.encoder.name, "frozen": cfg.encoder.frozen,
             "words": cfg.encoder.words, "seed": cfg.seed if cfg.encoder.name == "cnn" else None}
    if start is not None:
        about["pretraining"] = start.parent.name
    if cfg.encoder.name != TextEncoderConfig.name and (files := fingerprint(cfg.encoder)):
        about["files"] = files  # of a folder, which may hold others by now

    def prepare(data: Path) -> None:
        splits = {}
        kind = np.float32 if source.multi_label else np.int32
        texts = sum((source.parts[split].texts for split in SPLITS), ())  # together: one width for all parts
        with folder.progress(1, "reading texts") as advance:
            inputs = reader.inputs(texts, cfg.data.length, cfg.data.chunks, folder.check_stop)
            advance()
        ends = np.cumsum([len(source.parts[split]) for split in SPLITS])
        for split, start, end in zip(SPLITS, [0, *ends], ends, strict=False):
            rows = {name: array[start:end] for name, array in inputs.items()}
            splits[split] = rows | {"labels": source.parts[split].labels.astype(kind)}
        records.prepare(data, splits)

    return experiment.prepared(folder, about, prepare)


class Repeated:
    """Records in another order, some of them several times."""

    def __init__(self, source: records.Records, index: np.ndarray):
        self.source, self.index, self.files = source, index, source.files

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Any:
        return self.source[int(self.index[i])]


# Model and training


def build(cfg: Text2TreeRun, tree: LabelTree, reader: Reader) -> Text2Tree:
    """The model before training."""
    method = cfg.method
    ours = method.name in OURS
    rows = None
    if ours and method.start != "random":
        whole = reader.lower if reader.lower is not None else getattr(reader.encoder, "bert", reader.encoder)
        pieces = [reader.tokenizer.encode(tree.name_of(node), special=False) for node in range(len(tree))]
        known = (reader.tokenizer.inner.token_to_id(mask) for mask in ("[MASK]", "<mask>"))  # BERT's, RoBERTa's
        mask = next((piece for piece in known if piece is not None), None)
        if mask is None:
            raise UserError(f"method.start={method.start} needs a piece [MASK] or <mask> for the root of the tree; "
                            f"encoder.name={cfg.encoder.name} has none: take method.start=random")
        rows = label_rows(tree, pieces, whole.embed[...], mask)
    options = dataclasses.replace(for_inference(cfg), loss=loss_config(method), start=method.start,
                                  attention="gcn" if method.label_encoder == "gcn" else "auto")
    # trained in place: a copy, so that a second model of the same reader begins alike
    encoder = nnx.clone(reader.encoder)
    model = Text2Tree(encoder, outputs(cfg, tree), options, tree=tree if ours or options.head == "hiagm" else None,
                      pooler=reader.pooler, label_rows=rows, rngs=nnx.Rngs(cfg.seed))
    if method.name == "ldam_drw":
        model.taken = nnx.Variable(jnp.zeros((), jnp.int32))  # steps, see the objective
    return model


def outputs(cfg: Text2TreeRun, tree: LabelTree) -> int:
    """Of the head: the classes, or all nodes but the root. Raises UserError where the root is a class all the same."""
    if cfg.method.name not in OVER_NODES:
        return tree.num_classes
    if 0 in tree.leaf_index:
        raise UserError(f"method.name={cfg.method.name} has no output for the root of the tree, and {tree.names[0]!r} "
                        "is one of the codes; put a node above it in data.tree, or choose another method")
    return len(tree) - 1


def for_inference(cfg: Text2TreeRun) -> Text2TreeConfig:
    """What of the model's configuration predicting needs."""
    return Text2TreeConfig(LossConfig("plain"), pooler=cfg.encoder.has_pooler, chunks=cfg.data.chunks > 1,
                           head="hiagm" if cfg.method.name == "hiagm" else "linear")


def plan_training(cfg: Text2TreeRun, folder: RunFolder, source: CodedTexts, reader: Reader, data: Path, mesh: Mesh
                  ) -> Trial:
    """The model, its step and its data; nothing is trained yet."""
    part = records.open_records(data, "train")
    labels = source.parts["train"].labels
    rows: Any = part
    if cfg.method.name == "oversampling":
        rows = Repeated(part, baselines.oversample(labels, cfg.seed))
    epoch = len(part) // cfg.data.batch  # of the texts there are, not of their repetitions: equal budgets
    cfg = dataclasses.replace(cfg, loop=dataclasses.replace(cfg.loop, steps=cfg.epochs * epoch, evaluate_every=epoch))
    start = build(cfg, source.tree, reader)
    over = cfg.method.name in OVER_NODES
    if over or (source.multi_label and cfg.method.name != "logit_adjustment"):  # which adds the shares in its loss
        begin_with_shares(start, source.tree.texts_below(labels)[1:] if over else labels.sum(0), len(labels))
    if cfg.method.name == "hiagm":
        start.head.prior[...] = jnp.asarray(prior(labels, source.tree))
    optimizer, schedule = make_tuner(cfg)
    plan = blueprint(lambda key: start, optimizer, mesh, seed=cfg.seed)
    objective = CodedTextsObjective(cfg.method, tuple(source.train_counts.tolist()), len(labels), source.tree,
                                    cfg.loop.steps)
    step = TrainStep(plan.graphdef, objective, optimizer, cfg.loop.accumulate, schedule)
    batches = experiment.batches_of(cfg, rows, f"{cfg.data.name}/train")
    example = {name: jax.ShapeDtypeStruct((cfg.data.batch, *array.shape), array.dtype)
               for name, array in part[0].items()}
    best = Best(cfg, folder, plan, source, data, start)
    task = loop.Task(plan, step, batches, example, example["mask"].size, 0.0, best.evaluate, best.over)
    return Trial(cfg, folder, source, data, start, best, task, mesh)


def begin_with_shares(model: Text2Tree, counts: np.ndarray, texts: int) -> None:
    """Sets the head's biases so that its scores, sigmoids, begin at the share of training texts that have a code (Lin
    et al. 2017, section 3.3). counts: texts of each output, of all ``texts``.

    Zero biases would give every code to half of the texts, and rare codes take most of a short training to unlearn that
    (docs/log.md).
    """
    share = np.clip(counts / texts, 1 / (2 * texts), 1 - 1 / (2 * texts))  # finite where none or all
    getattr(model.head, "pooled", model.head).out_bias[...] = jnp.asarray(np.log(share / (1 - share)), jnp.float32)


def make_tuner(cfg: Text2TreeRun) -> tuple[optax.GradientTransformation, Callable[[Any], Any]]:
    """(optimizer, schedule of the head's rate): the encoder moves at a share of it, the label states at a tenth of the
    encoder's and without weight decay (section 4.5). At a tenth of the head's they would leave the encoder behind, and
    after a hundred steps be one axis, all cosines near 1 or -1 (docs/log.md, 2026-11-26)."""
    optimizer = make_optimizer(cfg.optimizer, cfg.loop.steps, spared="labels")
    schedule = make_schedule(cfg.optimizer, cfg.loop.steps)

    share = cfg.encoder.share
    shares = {"encoder": share, "labels": share * cfg.method.labels_rate}

    def scales(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.float32(shares.get(str(getattr(path[0], "key", path[0])), 1.0)), params)

    return scaled(optimizer, scales), schedule


class Best:
    """Evaluates on the development part, keeps the best model in ``model.npz`` and says when to stop.

    Of ldam_drw only what was re-weighted counts: before that it is another method, and training does not end there.

    The states of its labels, before training and with that model, are kept in ``labels.npz``: the model that is kept
    has none.
    """

    def __init__(self, cfg: Text2TreeRun, folder: RunFolder, plan: Blueprint, source: CodedTexts, data: Path,
                 start: Text2Tree):
        self.cfg, self.folder, self.plan, self.source = cfg, folder, plan, source
        self.inputs = loaded(data, "dev")
        self.after = baselines.deferred_from(cfg.loop.steps) if cfg.method.name == "ldam_drw" else 0
        self.before = None if start.labels is None else label_states(start.labels)
        self.scores = {line["step"]: line[CHOSEN_BY] for line in folder.metrics() if CHOSEN_BY in line}

    def evaluate(self, state: State, check: Callable[[], None]) -> dict[str, float]:
        step = int(jax.device_get(state["step"]))
        model = nnx.merge(self.plan.graphdef, jax.tree.map(jnp.asarray, nnx.state(
            experiment.model_on_host(self.plan, state))))
        found = scores_of(model, self.source.tree, self.source.multi_label,
                          self.cfg.method.name in OVER_NODES, self.inputs, check)
        labels = self.source.parts["dev"].labels
        if self.source.multi_label:
            threshold = text_metrics.tuned_threshold(labels, found)
            said = found >= threshold
        else:
            threshold, said = float("nan"), text_metrics.one_hot(found.argmax(1), found.shape[1])
            labels = text_metrics.one_hot(labels, found.shape[1])
        macro = float(text_metrics.f1(text_metrics.counts(labels, said))["macro_f1"])
        self.scores = {at: score for at, score in self.scores.items() if at < step}
        self.scores[step] = macro
        if self.step(step) == step and jax.process_index() == 0:
            arrays = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model.for_inference())))
            self.folder.save_npz("model", **{path_name(path): np.asarray(leaf) for path, leaf in arrays})
            if self.before is not None:
                states, attention = label_states(model.labels)
                self.folder.save_npz("labels", before=self.before[0], after=states, attention_before=self.before[1],
                                     attention=attention)
        return {CHOSEN_BY: macro} | ({"dev_threshold": threshold} if self.source.multi_label else {})

    def over(self, step: int) -> bool:
        """Whether `patience` evaluations up to `step` brought nothing better."""
        best = self.step(step)
        return best is not None and sum(best < at <= step for at in self.scores) >= self.cfg.patience

    def step(self, until: int) -> int | None:
        """The first step of the best score up to one, of those that count; None before there is any."""
        known = {at: score for at, score in self.scores.items() if self.after < at <= until}
        return max(known, key=lambda at: (known[at], -at), default=None)


def path_name(path: Any) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


def restored(start: Text2Tree, folder: Path) -> Text2Tree:
    """`start` with the arrays of a run's ``model.npz`` and without label states. Raises UserError for other arrays."""
    arrays = of_run(folder, "model")
    model = start.for_inference()
    graphdef, state = nnx.split(model)
    needed = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))}
    if unlike := (needed ^ arrays.keys()) - {"taken"}:  # the steps of ldam_drw are of its training alone
        raise UserError(f"{folder / 'model.npz'} is not of this model: {min(unlike)} is in one of them only. Runs of "
                        "before the head was linear have a pooler; train again, with encoder.pooler=true as it was")
    filled = jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.asarray(arrays[path_name(path)]),
                                              nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, filled)
    return nnx.merge(graphdef, state)


def of_run(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of ``name.npz``; UserError where a finished run has lost them."""
    arrays = load_npz(folder / f"{name}.npz")
    if arrays is None:
        raise UserError(f"{folder / name}.npz is missing or damaged; remove {folder} and train again")
    return arrays


# Scores


def loaded(data: Path, split: str) -> dict[str, np.ndarray]:
    """A part's inputs and labels, in memory."""
    part = records.open_records(data, split)
    rows = [part[i] for i in range(len(part))]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def scores_of(model: Text2Tree, tree: LabelTree, multi_label: bool, over_nodes: bool, inputs: dict[str, np.ndarray],
              check: Callable[[], None] = lambda: None, batch: int = 64) -> np.ndarray:
    """Scores in [0, 1] of every class, float32[n, K]."""
    out, count = [], len(inputs["mask"])
    batch = min(batch, count)
    for start in range(0, count, batch):
        check()
        here = np.resize(np.arange(start, min(start + batch, count)), batch)  # one shape
        logits = np.asarray(model(inputs["tokens"][here], inputs["mask"][here])[0])[:min(batch, count - start)]
        if over_nodes:
            logits = logits[:, tree.leaf_index - 1]
        out.append(predictions(logits, multi_label))
    return np.concatenate(out)


def numbers(cfg: Text2TreeRun, folder: RunFolder, source: CodedTexts, data: Path, model: Text2Tree) -> dict[str, Any]:
    """``test.METHOD.METRIC`` of the model and of TF-IDF, with intervals (``..._low``, ``..._high``) of the F1s.

    What reports and comparisons need beside lies in predictions.npz (labels, and of each method ``NAME_said`` and, of
    the scores, ``NAME_scores``: all of them where texts have several codes, else the highest) and examples.json.
    """
    found = {split: scores_of(model, source.tree, source.multi_label, cfg.method.name in OVER_NODES,
                              loaded(data, split), folder.check_stop) for split in ("dev", "test")}
    part, classes, masks = source.parts["test"], source.tree.num_classes, text_metrics.buckets(source.train_counts)
    truth = part.labels if source.multi_label else text_metrics.one_hot(part.labels, classes)
    results, saved = {}, {"labels": part.labels, "counts": source.train_counts}
    for name, scores in (("model", found), ("tfidf", floor_scores(cfg, folder, source))):
        folder.check_stop()
        test, threshold, prefix = scores["test"], None, ""
        if source.multi_label:
            threshold, prefix = text_metrics.tuned_threshold(source.parts["dev"].labels, scores["dev"]), "tuned_"
            saved[f"{name}_said"] = said = test >= threshold
            saved[f"{name}_scores"] = test.astype(np.float16)
        else:
            saved[f"{name}_said"], saved[f"{name}_scores"] = test.argmax(1), test.max(1)
            said = text_metrics.one_hot(test.argmax(1), classes)
        table = text_table(source, test, threshold)
        for key, ends in text_metrics.bootstrap_f1(truth, said, masks, draws=cfg.bootstrap).items():
            table |= {f"{prefix}{key}_{end}": value for end, value in zip(("low", "high"), ends, strict=True)}
        results |= {f"test.{name}.{key}": value for key, value in table.items()}
        if name == "model":
            write_json(folder.path("examples.json"), examples(part.texts, truth, said, source.tree.classes))
    folder.save_npz("predictions", **saved)
    return results


def floor_scores(cfg: Text2TreeRun, folder: RunFolder, source: CodedTexts) -> dict[str, np.ndarray]:
    """`text_floors.tfidf`, computed once for all trials of a sweep."""
    path = folder.shared / f"tfidf-{config_hash(what_is_read(cfg, source))}.npz"
    with folder.alone(path):
        found = load_npz(path)
        if found is None:
            found = text_floors.tfidf(source)
            if not source.multi_label:  # one class a text: a number is enough
                found = {split: scores.argmax(1) for split, scores in found.items()}
            if jax.process_index() == 0:
                save_npz(path, found)
    if source.multi_label:
        return found
    return {split: text_metrics.one_hot(classes, source.tree.num_classes).astype(np.float32)
            for split, classes in found.items()}


def text_table(source: CodedTexts, scores: np.ndarray, threshold: float | None) -> dict[str, float]:
    """Every metric of one method on the test part."""
    tree, truth = source.tree, source.parts["test"].labels
    if source.multi_label:
        return text_metrics.multi_label(truth, scores, threshold, source.train_counts, tree.ancestors())
    return text_metrics.multi_class(truth, scores.argmax(1), source.train_counts, tree.paths, tree.ancestors())


# What `jaxmodels predict` asks of a run

PIECE = 512  # texts whose states are in memory at once


def predict(config: Mapping[str, Any], folder: Path, texts: Sequence[str], top: int | None = None) -> Predictions:
    """See `train.predict`. The columns: score, given (whether the run's rule gives the code), code, description, and
    code and description of every level from the top of the tree down to it.

    Without `top`: where texts have several codes those above the threshold tuned on the development part; where they
    have one, the likeliest.
    """
    cfg = from_dict(Text2TreeRun, config)
    check_encoder(cfg, folder)
    classes = of_run(folder, "classes")
    tree, multi_label = tree_from(classes), bool(classes["multi_label"])
    threshold = (read_json(folder / RESULTS) or {}).get("test.model.threshold") if multi_label else None
    reader = make_reader(cfg.encoder, None, cfg.seed, folder)
    options = for_inference(cfg)
    model = restored(Text2Tree(reader.encoder, outputs(cfg, tree), options, tree=tree if options.head == "hiagm" else
                               None, pooler=reader.pooler, rngs=nnx.Rngs(cfg.seed)), folder)
    path_columns = [f"level_{level}{end}" for level in range(1, tree.num_levels + 1) for end in ("", "_description")]

    def about(node: int) -> tuple[str, str]:
        return ("", "") if node < 0 else (tree.names[node], tree.descriptions.get(tree.names[node], ""))

    def rows() -> Iterator[tuple[int, tuple[Any, ...]]]:
        for start in range(0, len(texts), PIECE):
            inputs = reader.inputs(texts[start:start + PIECE], cfg.data.length, cfg.data.chunks)
            scores = scores_of(model, tree, multi_label, cfg.method.name in OVER_NODES, inputs)
            given = scores >= threshold if multi_label else text_metrics.one_hot(scores.argmax(1), tree.num_classes)
            for i, (row, said) in enumerate(zip(scores, given, strict=True), start):
                order = np.argsort(-row, kind="stable")
                for k in order[:top] if top else order[said[order]]:
                    path = sum((about(int(node)) for node in tree.paths[k, 1:]), ())
                    yield i, (float(row[k]), "yes" if said[k] else "no", *about(int(tree.leaf_index[k])), *path)

    return Predictions(("score", "given", "code", "description", *path_columns), rows(),
                       "no answer above the run's threshold; --top 1 shows the likeliest")
