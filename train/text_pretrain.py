"""Pre-training of a fresh text encoder by masked pieces on a task's own texts (text2tree.md section 12), before
`train.text2tree` trains it with a classifier on top.

It reads the training part and what codes are called, never the test part; the development part is only asked about. It
is a run folder of its own, ``stages/pretrain/*`` inside the run's (or its sweep's, whose runs share it), resumed as any
other.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.esm.alphabet import PAD, STANDARD
from jaxmodels.esm.model import Esm
from jaxmodels.hub.tokenizer import Tokenizer
from train import experiment
from train.data import packing, records
from train.data.coded_texts import CodedTexts, code_names
from train.data.masking import NOTHING, MaskingConfig, choose
from train.objectives.masked_lm import MaskedLanguageModel
from train.optimizers import make_optimizer, make_schedule
from train.runtime import flops, loop
from train.runtime.config import config_hash
from train.runtime.files import read_json, write_json
from train.runtime.mesh import batch_pieces, use_mesh
from train.runtime.run_folder import RESULTS, RunFolder
from train.runtime.state import Blueprint, State, blueprint
from train.runtime.step import Sums, TrainStep
from train.settings import LoopConfig, MeshConfig, OptimizerConfig
from train.text2tree_config import FreshConfig, Text2TreeRun
from train.text_reader import SPECIAL, fresh_config, kept_pieces

FIELDS = ("tokens", "segments", "targets")
SUMS = ("hidden_weight", "hidden_nll", "hidden_correct")
QUARTER = 4  # of a row, one place in so many has a question at the most
VERSION = 1  # of `PieceMasking`: part of a run's fingerprint
TOLD = ("perplexity_before", "perplexity", "unigram_perplexity", "accuracy", "texts", "pieces", "vocabulary", "steps",
        "parameters")  # of its results, what a run that uses the encoder tells too


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the training runtime asks of a config."""

    data: FreshConfig
    loop: LoopConfig
    mesh: MeshConfig

    @property
    def seed(self) -> int:
        return self.data.seed

    @property
    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(learning_rate=self.data.learning_rate, beta2=0.98, weight_decay=0.01)


def pretrain(cfg: Text2TreeRun, folder: RunFolder, source: CodedTexts, mesh: Mesh) -> Path:
    """The folder of the pre-trained encoder, in ``folder.shared``: trained, resumed, or there already.

    Writes ``pretraining.*`` into the run's results. Raises UserError for a batch that the devices do not divide.
    """
    fresh, pieces = cfg.encoder.fresh, batch_pieces(mesh)
    if fresh.batch % pieces:
        raise UserError(f"encoder.fresh.batch={fresh.batch} is not divisible by {pieces}, the parts that the mesh cuts "
                        f"a batch into; set it to {-(-fresh.batch // pieces) * pieces}")
    texts, held_out = corpus(cfg, source), source.parts["dev"].texts
    about = {"encoder": dataclasses.asdict(fresh), "words": cfg.encoder.words, "texts": _digest(texts, held_out)}
    path = folder.shared / "stages" / "pretrain" / config_hash(about)  # so deep that no sweep takes it for a trial
    with folder.alone(path):
        if not (read_json(path / RESULTS) or {}).get("finished"):
            with type(folder)(path, about, "text_pretrain") as stage:
                _pretrain(cfg, stage, texts, held_out, mesh)
    results = read_json(path / RESULTS) or {}
    folder.write_results({f"pretraining.{name}": results[name] for name in TOLD})
    return path / "model"


def corpus(cfg: Text2TreeRun, source: CodedTexts) -> tuple[str, ...]:
    """Every distinct text: the training part, the names of the task's codes, and those of all its codes' system."""
    names = code_names(cfg.data.name, cfg.data.tree)[:cfg.data.limit]
    every = (*source.parts["train"].texts, *source.tree.descriptions.values(), *names)
    return tuple(dict.fromkeys(text for text in every if text.strip()))


def _digest(*parts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in (text for part in parts for text in (*part, "")):  # no text is empty
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def _pretrain(cfg: Text2TreeRun, stage: RunFolder, texts: Sequence[str], held_out: Sequence[str], mesh: Mesh) -> None:
    fresh = cfg.encoder.fresh
    tokenizer = kept_pieces(texts, cfg.encoder.words, stage.dir)
    # the folder's name says on what they depend
    data = experiment.prepared(stage, {}, functools.partial(_prepare, fresh, stage, tokenizer, texts, held_out))
    about = read_json(data / "about.json") or {}
    epoch = len(records.open_records(data, "train")) // fresh.batch
    settings = Settings(fresh, dataclasses.replace(
        cfg.loop, steps=fresh.epochs * epoch, evaluate_every=epoch, accumulate=1, style="auto", local_dir=None,
        local_every=None, profile=None), cfg.mesh)
    encoder = fresh_config(fresh, tokenizer)
    optimizer = make_optimizer(settings.optimizer, settings.loop.steps)
    plan = blueprint(lambda key: Esm(encoder, rngs=nnx.Rngs(params=key)), optimizer, mesh, seed=fresh.seed)
    objective = MaskedPieces(encoder.mask_id)
    step = TrainStep(plan.graphdef, objective, optimizer, 1, make_schedule(settings.optimizer, settings.loop.steps))
    transforms = {"random_transforms": (("pieces", VERSION, PieceMasking(encoder.mask_id, encoder.vocab_size)),)}
    evaluate = _evaluation(settings, plan, objective, mesh, data, transforms)
    if "perplexity_before" not in stage.results():
        with use_mesh(mesh, parts=cfg.mesh.parts, ragged=cfg.mesh.ragged):
            before = evaluate(plan.init(), stage.check_stop)
        stage.write_results({"perplexity_before": before["validation_perplexity"]})
    cost = flops.encoder_train_flops_per_token(dataclasses.replace(encoder, lm_head=False), about["mean_keys"])
    cost += 6 * encoder.d_model * (encoder.d_model + encoder.vocab_size) / QUARTER
    shapes = dict.fromkeys(FIELDS, jax.ShapeDtypeStruct((fresh.batch, fresh.length), np.int32))
    tokens = fresh.batch * fresh.length
    task = loop.Task(plan, step, experiment.open_batches(settings, data, "train", "texts/train", **transforms), shapes,
                     tokens, cost * tokens, evaluate)
    trained = experiment.train(settings, stage, task, mesh)
    model = experiment.model_on_host(plan, trained.state)
    if jax.process_index() == 0:
        jaxmodels.save(model, stage.dir / "model", extra_files=tokenizer.files(), overwrite=True)
        last = [line for line in stage.metrics() if "validation_perplexity" in line][-1]
        stage.write_results(
            about | experiment.run_numbers(trained, nnx.state(model, nnx.Param), tokens, cost)
            | {"perplexity": last["validation_perplexity"], "accuracy": last["validation_accuracy"],
               "vocabulary": encoder.vocab_size, "finished": True})
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("encoder saved")


# Data


def _prepare(fresh: FreshConfig, stage: RunFolder, tokenizer: Tokenizer, texts: Sequence[str], held_out: Sequence[str],
             data: Path) -> None:
    """Packed rows of both parts, each at least one batch of them, and ``about.json``."""
    cuts, packed = {}, {}
    with stage.progress(2, "reading texts to pre-train on") as advance:
        for split, part in (("train", texts), ("validation", held_out)):
            cuts[split] = cut(tokenizer.encode_batch(part), fresh.length)
            packed[split] = packing.pack_whole(cuts[split], fresh.length, SPECIAL.index("[PAD]"), fresh.seed)
            del packed[split]["documents"]
            stage.check_stop()
            advance()
    sizes = np.array([len(row) for row in cuts["train"]], float)
    write_json(data / "about.json", {
        "texts": len(texts), "rows": len(packed["train"]["tokens"]), "pieces": int(sizes.sum() - 2 * len(sizes)),
        "mean_keys": (sizes**2).sum() / sizes.sum(), "unigram_perplexity": _unigram(tokenizer.vocab_size, **cuts)})
    records.prepare(data, {split: {name: array[np.arange(max(len(array), fresh.batch)) % len(array)]
                                   for name, array in rows.items()} for split, rows in packed.items()})


def cut(rows: Sequence[list[int]], length: int) -> list[list[int]]:
    """Rows [CLS] pieces [SEP], longer ones in several of at most `length` that begin and end so; without empty ones."""
    step = length - 2
    return [[row[0], *row[at:min(at + step, len(row) - 1)], row[-1]] for row in rows
            for at in range(1, len(row) - 1, step)]


def _unigram(vocabulary: int, train: list[list[int]], validation: list[list[int]]) -> float:
    """Perplexity of the pieces of the validation part, guessed by how often each occurs in the other; one is added to
    every count."""
    inside, outside = (np.concatenate(rows) for rows in (train, validation))
    counts = np.bincount(inside, minlength=vocabulary)[len(SPECIAL):] + 1
    asked = outside[outside >= len(SPECIAL)] - len(SPECIAL)
    return float(np.exp(-np.log(counts / counts.sum())[asked].mean()))


@dataclasses.dataclass(frozen=True)
class PieceMasking:
    """`train.data.masking.Masking` for pieces of text: the special tokens are never asked for, and replacements are
    drawn from all the others."""

    mask_id: int
    vocab_size: int
    cfg: MaskingConfig = MaskingConfig()

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        tokens = record["tokens"]
        # which places: as if every piece were one residue
        asked, fate = choose(np.where(tokens >= len(SPECIAL), STANDARD[0], PAD), record["segments"], self.cfg, rng)
        drawn = rng.integers(len(SPECIAL), self.vocab_size, len(asked), dtype=np.int32)
        seen, targets = tokens.copy(), np.full_like(tokens, NOTHING)
        seen[asked], targets[asked] = np.choose(fate, (self.mask_id, drawn, tokens[asked])), tokens[asked]
        return {**record, "tokens": seen, "targets": targets}


@dataclasses.dataclass(frozen=True)
class MaskedPieces(MaskedLanguageModel):
    """The same loss, with the head over the places that are asked for and no others: over a vocabulary of thousands it
    would cost as much as all layers of a small model. Of a row a quarter at most (15 % are asked for)."""

    def loss(self, model: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Sums]:
        tokens, segments, targets = (batch[name] for name in FIELDS)
        states = model.forward(tokens, mask=segments > 0, segments=segments, output="hidden")[0]
        places = jnp.argsort(targets < 0, axis=1, stable=True)[:, :tokens.shape[1] // QUARTER]  # those asked for first
        few = {name: jnp.take_along_axis(batch[name], places, 1) for name in FIELDS}
        logits = model.unembed(jnp.take_along_axis(states, places[..., None], 1))
        loss, sums = super().loss(_Logits(logits), few, key)
        return loss, sums | {"tokens": (segments > 0).sum()}


@dataclasses.dataclass(frozen=True)
class _Logits:
    """Stands for a model whose answer is known."""

    logits: jax.Array

    def forward(self, tokens: jax.Array, **_: Any) -> tuple[jax.Array, dict[str, Any]]:
        return self.logits, {}


def _evaluation(settings: Settings, plan: Blueprint, objective: MaskedLanguageModel, mesh: Mesh, data: Path,
                transforms: dict[str, Any]) -> Callable[[State, Callable[[], None]], dict[str, float]]:
    """(state, check) -> validation_loss, _perplexity, _accuracy of hidden pieces, the same ones every time."""
    def numbers(total: dict[str, float]) -> dict[str, float]:
        weight = max(total["hidden_weight"], 1)
        loss = total["hidden_nll"] / weight
        return {"validation_loss": loss, "validation_perplexity": float(np.exp(loss)),
                "validation_accuracy": total["hidden_correct"] / weight}

    count = len(records.open_records(data, "validation")) // settings.data.batch
    return experiment.evaluator(
        settings, plan, mesh, objective, SUMS, FIELDS,
        lambda: experiment.open_batches(settings, data, "validation", "texts/validation", **transforms), count, numbers)
