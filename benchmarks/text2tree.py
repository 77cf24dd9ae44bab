"""Text2Tree beside plain fine-tuning, and plain fine-tuning beside PyTorch: training steps and answers.

    jaxmodels bench text2tree [--out FILE]     # two quiet CPU cores: about eight minutes; peers: torch, transformers

Both methods as `jaxmodels run text2tree` builds, trains and asks them: MiniLM, 64 texts of 128 tokens (random words, no
padding), 100 classes of a tree of 167 nodes, 8.5 a text; once with the lower four layers frozen (their states in place
of tokens), once with the whole encoder trained. Then phrases: 24 tokens, one of 1,918 classes of a tree of 2,226 nodes,
four layers frozen. In turns in one process, same weights, same texts.

PyTorch: transformers' BertModel (sdpa, no attention mask, no dropout inside, which ours has not either), mean over
tokens, the same linear head, AdamW; float32 on as many threads as there are cores. Its answers and its loss are
compared with ours before anything is timed.
"""

import dataclasses
import gc
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxmodels
from benchmarks._report import check_out, machine, publish
from benchmarks._timing import Samples, cores, take_turns
from jaxmodels.text2tree import baselines
from jaxmodels.text2tree.tree import LabelTree
from train.experiment import plan_step
from train.objectives.coded_texts import CodedTextsObjective
from train.runtime.mesh import make_mesh, use_mesh
from train.runtime.state import blueprint
from train.runtime.step import TrainStep
from train.settings import MeshConfig
from train.text2tree import build, make_tuner
from train.text2tree_config import MethodConfig, Text2TreeRun, TextDataConfig, TextEncoderConfig
from train.text_reader import Reader, make_reader

COLUMNS = ("what", "side", "texts/s", "ms", "p10", "p90", "x plain", "bar", "result")
PEERS = ("torch", "transformers")
BARS = {"training": 1.25, "inference": 1.05}  # times the plain method's; the second: what counts as equal


@dataclasses.dataclass(frozen=True)
class Codes:
    """Nodes of a tree by level: letters, prefixes, classes. a_text: how many classes a text has; None: one, by a
    softmax. skew: above 1, the first prefixes have the most classes."""

    letters: int
    prefixes: int
    classes: int
    a_text: float | None = None
    skew: float = 1.0

    def tree(self) -> LabelTree:
        """From code strings."""
        prefixes = [f"{chr(65 + i % self.letters)}{i // self.letters + 1:02d}" for i in range(self.prefixes)]
        place = (self.prefixes * (np.arange(self.classes) / self.classes) ** self.skew).astype(int)
        return LabelTree.from_codes(f"{prefixes[at]}.{100 + i}" for i, at in enumerate(place))

    def of(self, texts: int) -> np.ndarray:
        """Labels: {0, 1}, float32[texts, classes], or int32[texts]."""
        rng = np.random.default_rng(0)
        if self.a_text is None:
            return rng.integers(self.classes, size=texts, dtype=np.int32)
        return (rng.random((texts, self.classes)) < self.a_text / self.classes).astype(np.float32)


MESH = Codes(10, 56, 100, a_text=8.5)  # as PubMed's (text2tree.md section 3.2)
ICD = Codes(22, 285, 1918, skew=1.35)  # as of `icd_phrases`, whose largest family has 27; here 30


def main(out: str | None, *, encoder: str = "all-minilm-l6-v2", frozen: int = 4, batch: int = 64, length: int = 128,
         short: int = 24, repeats: Sequence[int] = (15, 21, 9, 15, 15, 21)) -> None:
    """Measures, prints a table, and writes ``out``. length, short: tokens of a text and of a phrase. repeats: of
    training and inference with frozen layers, without, and of phrases."""
    check_out(out)
    about, peer = machine(PEERS), all(map(importlib.util.find_spec, PEERS))
    notes = ["x plain: time over the plain method's, medians of turns; ms, p10, p90 of a batch",
             f"equal: at most {BARS['inference']:.2f}, or the ranges from p10 to p90 overlap"]
    rows = []
    some, whole = f"{frozen} layers frozen", "whole encoder"
    for i, (what, layers, tokens, codes) in enumerate((
            (some, frozen, length, MESH), (whole, 0, length, MESH), (f"phrases, {some}", frozen, short, ICD))):
        cfg = Text2TreeRun(data=TextDataConfig(batch=batch, length=tokens), mesh=MeshConfig(data=1),
                           encoder=TextEncoderConfig(name=encoder, frozen=layers))
        rows += measure(what, cfg, codes, repeats[2 * i:2 * i + 2], peer and what == whole)
        gc.collect()
    if not peer:
        rows.append({"what": whole, "side": "PyTorch, plain", "result": "torch is not installed"})
    same = all(row.get("same_program", True) for row in rows)
    notes.append(f"inference: both methods give the compiler {'the same program' if same else 'DIFFERENT programs'}")
    elsewhere = max(row["samples"]["elsewhere"] for row in rows if "samples" in row)
    notes += [f"other processes took up to {elsewhere:.0%} of the cores meanwhile",
              " ".join((__doc__ or "").split("\n\n", 2)[2].split())]
    publish("Text2Tree, float32", rows, COLUMNS, about, notes, out)


def measure(what: str, cfg: Text2TreeRun, codes: Codes, repeats: Sequence[int], peer: bool) -> list[dict[str, Any]]:
    """Rows of training and of inference with one encoder; ``peer``: PyTorch's too."""
    tree = codes.tree()
    reader = make_reader(cfg.encoder, None, cfg.seed, Path())
    batch = texts(reader, cfg.data.batch, cfg.data.length) | {"labels": codes.of(cfg.data.batch)}
    methods = {name: dataclasses.replace(cfg, method=MethodConfig(name)) for name in ("plain", "text2tree")}
    answers: dict[str, Callable[[], Any]] = {name: Answering(one, tree, reader, batch) for name, one in methods.items()}
    same = len({side.program() for side in answers.values()}) == 1
    steps: dict[str, Callable[[], Any]] = {name: Training(one, tree, reader, batch) for name, one in methods.items()}
    if peer:
        theirs = Torch(cfg, reader, answers["plain"].model, batch)
        answers["PyTorch, plain"], steps["PyTorch, plain"] = theirs.answer, theirs.step
    check_same_work(answers, batch["labels"], theirs.first_loss() if peer else None)
    more = {"batch": cfg.data.batch, "length": batch["mask"].shape[1], "nodes": len(tree), "encoder": cfg.encoder.name}
    found = compare(f"training, {what}", take_turns(steps, repeats[0], warmup=1), cfg.data.batch, **more)
    return found + compare(f"inference, {what}", take_turns(answers, repeats[1]), cfg.data.batch, **more,
                           same_program=same)


def compare(what: str, samples: dict[str, Samples], texts: int, **more: Any) -> list[dict[str, Any]]:
    """A row for each side; the full method's is held against the bar."""
    plain, bar, rows = samples["plain"], BARS[what.partition(",")[0]], []
    for name, one in samples.items():
        summary = one.summary()
        ratio = one.median / plain.median
        row = {"what": what, "side": name, "texts/s": texts / one.median, "ms": summary["median_s"] * 1e3,
               "p10": summary["p10_s"] * 1e3, "p90": summary["p90_s"] * 1e3, "x plain": ratio, "samples": summary,
               **more}
        if name == "text2tree":
            apart = summary["p10_s"] > plain.summary()["p90_s"] or not what.startswith("inference")
            row |= {"bar": bar, "result": "missed" if ratio > bar and apart else "met"}
        rows.append(row)
    return rows


def texts(reader: Reader, batch: int, length: int) -> dict[str, np.ndarray]:
    """What a step reads: every text is longer than what is read of it."""
    words = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), (batch, length, 4))
    return reader.inputs([" ".join(map("".join, text)) for text in words], length)


class Training:
    """A step as `train.text2tree` plans it and the loop compiles and calls it."""

    def __init__(self, cfg: Text2TreeRun, tree: LabelTree, reader: Reader, batch: dict[str, np.ndarray]):
        mesh, start = make_mesh(cfg.mesh, jax.devices()[:1]), build(cfg, tree, reader)
        optimizer, schedule = make_tuner(cfg)
        plan = blueprint(lambda key: start, optimizer, mesh, seed=cfg.seed)
        labels = batch["labels"]
        counts = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=tree.num_classes)
        objective = CodedTextsObjective(cfg.method, tuple(counts.tolist()), cfg.data.batch, tree)
        step = TrainStep(plan.graphdef, objective, optimizer, cfg.loop.accumulate, schedule)
        shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}
        with use_mesh(mesh):
            self.compiled = plan_step(cfg, plan, step, shapes, 0.0, mesh).lowered.compile()
            self.state = plan.init()
        self.batch = jax.device_put(batch)

    def __call__(self) -> float:
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready(self.state)
        loss, skipped = float(metrics["loss"]), int(metrics["skipped"])
        if skipped:
            raise RuntimeError(f"{skipped} steps were skipped, the last loss was {loss}: nothing was trained")
        return loss


class Answering:
    """The logits of a batch, float32[B, K], as `train.text2tree.scores_of` asks for them."""

    def __init__(self, cfg: Text2TreeRun, tree: LabelTree, reader: Reader, batch: dict[str, np.ndarray]):
        self.model, self.inputs = build(cfg, tree, reader).for_inference(), (batch["tokens"], batch["mask"])

    def __call__(self) -> np.ndarray:
        return np.asarray(self.model(*self.inputs)[0])

    def program(self) -> str:
        """What the compiler is given."""
        graphdef, state = nnx.split(self.model)

        def logits(state: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, state).forward(tokens, mask)[0]

        return jax.jit(logits).lower(state, *self.inputs).as_text()


class Torch:
    """Plain fine-tuning, written straightforwardly, from the weights of one of our models."""

    def __init__(self, cfg: Text2TreeRun, reader: Reader, model: Any, batch: dict[str, np.ndarray]):
        import torch
        import transformers

        torch.set_num_threads(cores())
        torch.manual_seed(cfg.seed)
        transformers.logging.disable_progress_bar()
        self.torch, head, options = torch, model.head, cfg.optimizer
        with tempfile.TemporaryDirectory() as folder:
            jaxmodels.save(reader.encoder.bert, Path(folder) / "bert")
            self.bert = transformers.BertModel.from_pretrained(
                Path(folder) / "bert", add_pooling_layer=False, attn_implementation="sdpa", dtype=torch.float32,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        self.head = torch.nn.Sequential(torch.nn.Dropout(head.rate), self._linear(head.out, head.out_bias))
        self.ids, self.labels = torch.from_numpy(batch["tokens"]).long(), torch.from_numpy(batch["labels"])
        self.optimizer = torch.optim.AdamW([*self.bert.parameters(), *self.head.parameters()], options.learning_rate,
                                           (options.beta1, options.beta2), weight_decay=options.weight_decay)

    def _linear(self, weight: Any, bias: Any) -> Any:
        layer = self.torch.nn.Linear(*weight[...].shape)
        for parameter, value in ((layer.weight, weight[...].T), (layer.bias, bias[...])):
            parameter.data = self.torch.from_numpy(np.array(value))
        return layer

    def _train(self, on: bool) -> None:
        self.bert.train(on)
        self.head.train(on)

    def _loss(self) -> Any:
        logits = self.head(self.bert(self.ids).last_hidden_state.mean(1))
        return self.torch.nn.functional.binary_cross_entropy_with_logits(logits, self.labels)

    def answer(self) -> np.ndarray:
        self._train(False)
        with self.torch.inference_mode():
            return self.head(self.bert(self.ids).last_hidden_state.mean(1)).numpy()

    def first_loss(self) -> float:
        """Without dropout."""
        self._train(False)
        with self.torch.inference_mode():
            return float(self._loss())

    def step(self) -> float:
        self._train(True)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def check_same_work(answers: dict[str, Callable[[], Any]], labels: np.ndarray, their_loss: float | None) -> None:
    """RuntimeError where a side's logits are not the plain method's, or PyTorch's loss is not ours of those logits: the
    ratio would be worthless. All begin with the same weights."""
    ours = answers["plain"]()
    for name, side in answers.items():
        if not np.allclose(side(), ours, rtol=1e-4, atol=1e-4):
            raise RuntimeError(f"the answers of {name} are not ours: they did not do the same work")
    loss = float(baselines.plain(jnp.asarray(ours), jnp.asarray(labels)).mean())
    if their_loss is not None and not np.isclose(their_loss, loss, rtol=1e-4):
        raise RuntimeError(f"PyTorch's loss is {their_loss:.5f}, ours {loss:.5f}: they did not do the same work")
