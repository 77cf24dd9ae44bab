"""Fine-tuning an ESM encoder for the top-level EC class of enzymes, beside three floors on every set.

Choices (rates, steps, when to stop) are made on the validation part; the test sets are read once, at the end.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.esm.alphabet import PAD, TOKENS, encode
from jaxmodels.esm.model import Esm
from train import enzyme_floors, enzyme_transfer, experiment, metrics
from train.data import packing, records
from train.data.buckets import LENGTHS, bucketed
from train.data.proteins import STRATA, Protein, protein_source
from train.enzyme_config import EnzymeConfig
from train.objectives.classify import Classify, class_weights
from train.optimizers import layerwise, make_optimizer, make_schedule, scaled
from train.runtime import files, flops, loop
from train.runtime.mesh import check_batch, make_mesh
from train.runtime.run_folder import RunFolder
from train.runtime.state import Blueprint, State, blueprint, split
from train.runtime.step import TrainStep

CLASSES = 7
TRAINED = {"strict": ("train",), "easy": ("train", "near_eval")}
CHOSEN_BY = "validation_macro_f1"


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Enzymes with one top-level class each: sequences, labels int[n] (0 is EC 1), names."""

    sequences: tuple[str, ...]
    labels: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def digest(self) -> str:
        """SHA-256 of sequences and labels."""
        return hashlib.sha256(repr((self.sequences, self.labels.tolist())).encode()).hexdigest()

    @classmethod
    def joined(cls, parts: Sequence["Labelled"]) -> "Labelled":
        return cls(sum((part.sequences for part in parts), ()), np.concatenate([part.labels for part in parts]),
                   sum((part.names for part in parts), ()))

    def where(self, keep: Sequence[bool]) -> "Labelled":
        chosen = np.flatnonzero(keep)
        return Labelled(tuple(self.sequences[i] for i in chosen), self.labels[chosen],
                        tuple(self.names[i] for i in chosen))


def run(cfg: EnzymeConfig, folder: RunFolder) -> None:
    """Fine-tunes in every setting, then tests; the first setting in the folder itself, a second in a stage of it."""
    if folder.results().get("finished"):
        return
    mesh = make_mesh(cfg.mesh)
    check_batch(cfg.data.batch, cfg.loop.accumulate, mesh)
    parts, counts = read_parts(cfg)
    digest = hashlib.sha256("".join(part.digest for part in parts.values()).encode()).hexdigest()
    experiment.check_data(folder, digest, f"proteins or classes of {cfg.data.source}")
    folder.write_results({experiment.DATA: digest, **{f"data.{name}": value for name, value in counts.items()},
                          "pretrained": cfg.pretrained if cfg.pretrained != "none" else "none (random weights)"})
    found: dict[str, dict[str, np.ndarray]] = {}
    asked = test_sets(cfg, parts)
    sequences = sorted({sequence for one in asked.values() for sequence in one.sequences})
    for number, setting in enumerate(cfg.settings):
        stage = folder if number == 0 else folder.stage(setting, operational=cfg.operational)
        with contextlib.nullcontext(stage) if number == 0 else stage:
            model = fine_tune(cfg, stage, parts, setting, mesh)
            if jax.process_index() == 0:
                classes = predict(model, sequences).argmax(-1)
                found[setting] = dict(zip(sequences, classes.tolist(), strict=True))
                if cfg.data.external:
                    folder.write_results(whole_numbers(cfg, model, setting, folder))
    if jax.process_index() == 0:
        folder.write_results(table(cfg, parts, asked, found, folder) | {"finished": True})


# Data


def read_parts(cfg: EnzymeConfig) -> tuple[dict[str, Labelled], dict[str, int]]:
    """(train, valid, near_eval and test of the source, counts). Proteins of several top-level classes are left out."""
    read, counts = protein_source(cfg.data.source)
    parts = {name: labelled([protein for protein in read if protein.split == name])
             for name in ("train", "valid", "near_eval", "test")}
    counts["several_classes"] = sum(len(protein.top) != 1 for protein in read)
    if cfg.data.limit:
        parts = {name: part.where(np.arange(len(part)) < cfg.data.limit) for name, part in parts.items()}
    for name in ("train", "valid", "test"):
        if not len(parts[name]):
            raise UserError(f"data.source={cfg.data.source} has no {name} proteins of one top-level class; give some")
    return parts, counts | {f"{name}_proteins": len(part) for name, part in parts.items()}


def labelled(proteins: Sequence[Protein]) -> Labelled:
    """Those with exactly one top-level class."""
    kept = [protein for protein in proteins if len(protein.top) == 1]
    return Labelled(tuple(protein.sequence for protein in kept),
                    np.array([protein.top[0] - 1 for protein in kept], int), tuple(protein.name for protein in kept))


def test_sets(cfg: EnzymeConfig, parts: dict[str, Labelled]) -> dict[str, Labelled]:
    """``test``, and where the sets are here: ``test_le30`` ... (its strata) and ``care_30``, ``care_30-50``.

    The strata are of identity to DeepFRI's training chains, which nothing here is trained on: they say how far a chain
    is from what is well known, not from our training part, of whose clusters no test chain is.
    """
    test = parts["test"]
    asked = {"test": test}
    if not cfg.data.external:
        return asked
    with contextlib.suppress(UserError):
        strata = {protein.name: protein.strata for protein in protein_source("nrpdb_ec").proteins}
        for stratum in STRATA:
            part = test.where([stratum in strata.get(name, ()) for name in test.names])
            if len(part):
                asked[f"test_{stratum}"] = part
    with contextlib.suppress(UserError):
        care = protein_source("care_task1").proteins
        for name in dict.fromkeys(protein.split for protein in care):
            asked[f"care_{name}"] = labelled([protein for protein in care if protein.split == name])
    return asked


def prepare_data(cfg: EnzymeConfig, folder: RunFolder, train: Labelled, setting: str) -> Path:
    """Packed rows with the class of every segment, in a ``data-*`` folder of the run (or its sweep)."""
    about = {"seed": cfg.seed, "setting": setting, "classes": CLASSES, "proteins": train.digest,
             **{key: getattr(cfg.data, key) for key in ("source", "length", "limit")}}

    def prepare(data: Path) -> None:
        rows = packing.pack_whole([ids(sequence, cfg.data.length) for sequence in train.sequences], cfg.data.length,
                                  PAD, cfg.seed)
        numbers = rows.pop("documents")
        targets = np.where(numbers >= 0, train.labels[numbers], -1).astype(np.int32)
        records.prepare(data, {"train": {**rows, "targets": targets}})

    return experiment.prepared(folder, about, prepare)


def ids(sequence: str, length: int) -> np.ndarray:
    """A protein as at most `length` tokens; of a longer one, its beginning."""
    return encode(sequence[:length - 2])[0]


# Model and training


def fine_tune(cfg: EnzymeConfig, folder: RunFolder, parts: dict[str, Labelled], setting: str, mesh: Mesh) -> Esm:
    """The model with the best validation macro-F1, which also lies in ``folder/model``."""
    train = Labelled.joined([parts[name] for name in TRAINED[setting]])
    data = prepare_data(cfg, folder, train, setting)
    batches = experiment.open_batches(cfg, data, "train", f"{cfg.data.source}/{setting}")
    row = records.open_records(data, "train")[0]
    example = {name: jax.ShapeDtypeStruct((cfg.data.batch, *row[name].shape), np.int32)
               for name in ("tokens", "segments", "targets")}
    start = starting_model(cfg)
    optimizer, schedule = make_tuner(cfg, start)
    plan = plan_from(start, optimizer, mesh, cfg.seed)
    objective = Classify(class_weights(train.labels, CLASSES) if cfg.tune.weighted else None)
    step = TrainStep(plan.graphdef, objective, optimizer, cfg.loop.accumulate, schedule)
    keys = np.array([min(len(sequence) + 2, cfg.data.length) for sequence in train.sequences], float)
    tokens = cfg.data.batch * cfg.data.length
    cost = flops.encoder_train_flops_per_token(start.cfg, (keys**2).sum() / keys.sum())
    best = Best(cfg, folder, plan, parts["valid"])
    task = loop.Task(plan, step, batches, example, tokens, cost * tokens, best.evaluate, best.over)
    trained = experiment.train(cfg, folder, task, mesh)
    numbers = experiment.run_numbers(trained, trained.state["params"], tokens, cost)
    chosen = max(best.scores.items(), key=lambda one: (one[1], -one[0]))
    folder.write_results(numbers | {"epochs": trained.step * cfg.data.batch / len(records.open_records(data, "train")),
                                    "chosen_step": chosen[0], CHOSEN_BY: chosen[1], "setting": setting,
                                    "train_proteins": len(train)})
    return jaxmodels.load(folder.dir / "model")


def starting_model(cfg: EnzymeConfig) -> Esm:
    """The encoder to begin with and a fresh head; neither masked-LM nor contact head, which nothing here trains."""
    if cfg.pretrained == "none":
        encoder = dataclasses.replace(cfg.model.encoder(), lm_head=False, contact_head=False, classes=CLASSES,
                                      pool=cfg.tune.pool)
        return Esm(encoder, rngs=nnx.Rngs(params=jax.random.key(cfg.seed)))
    name: Any = Path(cfg.pretrained).expanduser() / "model"
    name = name if name.is_dir() else cfg.pretrained
    # classes=0 first: a classifier that the files hold is of other classes, or of another training
    encoder = jaxmodels.load(name, lm_head=False, contact_head=False, classes=0)
    if not isinstance(encoder, Esm):
        raise UserError(f"pretrained={cfg.pretrained} is a {type(encoder).__name__}, not an ESM encoder; give a run of "
                        "esm_pretrain or an ESM model")
    check_reads(encoder, f"pretrained={cfg.pretrained}", max(cfg.data.length, LENGTHS[-1]))
    options = dataclasses.replace(encoder.cfg, classes=CLASSES, pool=cfg.tune.pool)
    model = Esm(options, rngs=nnx.Rngs(params=jax.random.key(cfg.seed)))
    nnx.update(model, nnx.state(encoder))
    return model


def check_reads(model: Esm, name: str, length: int) -> None:
    """Raises UserError for a model of another alphabet, or whose table of positions ends before `length` tokens."""
    if model.cfg.vocab_size != len(TOKENS):
        raise UserError(f"{name} has a vocabulary of {model.cfg.vocab_size} tokens; proteins are spelt in the "
                        f"{len(TOKENS)} of ESM-2 and ESM-1b, give such a model")
    room = model.cfg.max_positions - model.cfg.pad_id - 1
    if model.cfg.position == "learned" and room < length:
        raise UserError(f"{name} has positions for {room} tokens; {length} are read, give a model that has them")


def make_tuner(cfg: EnzymeConfig, start: Esm) -> tuple[optax.GradientTransformation, Callable[[Any], Any]]:
    """(optimizer, schedule of the head's rate). Without pre-training everything moves at the head's rate."""
    optimizer, schedule = make_optimizer(cfg.optimizer, cfg.loop.steps), make_schedule(cfg.optimizer, cfg.loop.steps)
    if cfg.pretrained == "none":
        return optimizer, schedule
    scales = functools.partial(layerwise, layers=start.cfg.num_layers, trunk=cfg.tune.trunk,
                               decay=cfg.tune.layer_decay)
    return scaled(optimizer, scales), schedule


def plan_from(start: Esm, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> Blueprint:
    """A blueprint whose state begins with the parameters of `start`."""
    plan = blueprint(lambda key: Esm(start.cfg, rngs=nnx.Rngs(params=key)), optimizer, mesh, seed=seed)
    params = split(start)[1]

    def init() -> State:
        return {**plan.init(), "params": jax.tree.map(jax.device_put, params, plan.shardings["params"])}

    return dataclasses.replace(plan, init=init)


class Best:
    """Evaluates on the validation part, keeps the best model in ``folder/model`` and says when to stop."""

    def __init__(self, cfg: EnzymeConfig, folder: RunFolder, plan: Blueprint, valid: Labelled):
        self.cfg, self.folder, self.plan, self.valid = cfg, folder, plan, valid
        # What an earlier start has logged; lines after the step that is restored are cut, and evaluated again alike.
        self.scores = {line["step"]: line[CHOSEN_BY] for line in folder.metrics() if CHOSEN_BY in line}

    def evaluate(self, state: State, check: Callable[[], None]) -> dict[str, float]:
        step = int(jax.device_get(state["step"]))
        host = experiment.model_on_host(self.plan, state)
        model = nnx.merge(self.plan.graphdef, jax.tree.map(jnp.asarray, nnx.state(host)))  # moved once, not a batch
        logits = predict(model, self.valid.sequences, check)
        scores = metrics.class_scores(metrics.confusion(self.valid.labels, logits.argmax(-1), CLASSES))
        nll = float(np.mean(np.logaddexp.reduce(logits, -1) - logits[np.arange(len(logits)), self.valid.labels]))
        self.scores = {at: score for at, score in self.scores.items() if at < step}
        better = float(scores["macro_f1"]) > max(self.scores.values(), default=-1.0)
        self.scores[step] = float(scores["macro_f1"])
        if better and jax.process_index() == 0:
            jaxmodels.save(model, self.folder.dir / "model", overwrite=True)
        return {CHOSEN_BY: self.scores[step], "validation_accuracy": float(scores["accuracy"]), "validation_loss": nll}

    def over(self, step: int) -> bool:
        """Whether `patience` evaluations up to `step` brought nothing better."""
        known = {at: score for at, score in self.scores.items() if at <= step}
        if not known:
            return False
        best = max(known, key=lambda at: (known[at], -at))
        return sum(at > best for at in known) >= self.cfg.tune.patience


def predict(model: Esm, sequences: Sequence[str], check: Callable[[], None] = lambda: None) -> np.ndarray:
    """Logits float32[n, C] of proteins, in batches of like length; the first 1022 residues of longer ones."""
    rows = [ids(sequence, LENGTHS[-1]) for sequence in sequences]
    found = np.zeros((len(rows), model.cfg.classes), np.float32)
    for batch in bucketed(rows):
        check()
        found[batch.index] = np.asarray(model(batch.tokens, output="class")[0])[:len(batch.index)]
    return found


# The end


def table(cfg: EnzymeConfig, parts: dict[str, Labelled], asked: dict[str, Labelled],
          found: dict[str, dict[str, int]], folder: RunFolder) -> dict[str, Any]:
    """``SETTING.SET.METHOD.METRIC`` for model and floors: accuracy, macro_f1, recall_1 ... recall_7, each with _low
    and _high (95 % bootstrap); ``SETTING.SET.model_less_FLOOR.macro_f1``; and n of each set. Floors know train, valid
    and, in the easy setting, near_eval.
    """
    results: dict[str, Any] = {}
    sequences = sorted({sequence for one in asked.values() for sequence in one.sequences})
    for setting, model in found.items():
        # in the order of the source, so that equally similar neighbours are told apart as in the recorded floors
        known = Labelled.joined([parts[name] for name in ("train", "valid",
                                                          *(("near_eval",) if setting == "easy" else ()))])
        guesses = enzyme_floors.floor_predictions(known.sequences, known.labels, sequences)
        by = {"model": model} | {name: dict(zip(sequences, labels.tolist(), strict=True))
                                 for name, labels in guesses.items()}
        for name, part in asked.items():
            results[f"{setting}.{name}.n"] = len(part)
            predicted = {method: np.array([answers[sequence] for sequence in part.sequences], int)
                         for method, answers in by.items()}
            for method, answers in predicted.items():
                results |= {f"{setting}.{name}.{method}.{metric}": value
                            for metric, value in scores_of(part.labels, answers, cfg.bootstrap, cfg.seed).items()}
                if method != "model":
                    less = metrics.macro_f1_difference(part.labels, predicted["model"], answers, CLASSES, cfg.bootstrap,
                                                       cfg.seed)
                    results |= {f"{setting}.{name}.model_less_{method}.macro_f1{end}": value
                                for end, value in zip(("", "_low", "_high"), less, strict=True)}
        folder.check_stop()
    files.write_json(folder.path("predictions.json"), {
        "names": list(asked["test"].names), "labels": (asked["test"].labels + 1).tolist(),
        **{setting: [model[sequence] + 1 for sequence in asked["test"].sequences] for setting, model in found.items()}})
    return results


def whole_numbers(cfg: EnzymeConfig, model: Esm, setting: str, folder: RunFolder) -> dict[str, float]:
    """``SETTING.SET.LIKENESS.METRIC`` of `train.enzyme_transfer`; known is what the floors know."""
    splits = {"train", "valid", *(("near_eval",) if setting == "easy" else ())}
    known = [protein for protein in protein_source(cfg.data.source).proteins if protein.split in splits]
    found = enzyme_transfer.transferred(model, known, folder.check_stop)
    return {f"{setting}.{name}": value for name, value in found.items()}


def scores_of(labels: np.ndarray, predicted: np.ndarray, draws: int, seed: int) -> dict[str, float]:
    """accuracy, macro_f1 and recall_1 ... recall_7 with their intervals; classes without members are left out."""
    counts = metrics.confusion(labels, predicted, CLASSES)
    values, intervals = metrics.class_scores(counts), metrics.bootstrap(counts, draws, seed)
    flat = {name: (values[name], intervals[name]) for name in ("accuracy", "macro_f1")}
    flat |= {f"recall_{c + 1}": (values["recall"][c], intervals["recall"][:, c]) for c in range(CLASSES)
             if counts[c].sum()}
    return {f"{name}{end}": float(number) for name, (value, (low, high)) in flat.items()
            for end, number in (("", value), ("_low", low), ("_high", high))}
