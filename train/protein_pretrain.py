"""Pre-training an ESM encoder from random weights on proteins: data, model, loop, and what is left when it is done."""

import contextlib
import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.esm.alphabet import PAD, encode
from jaxmodels.esm.config import EsmConfig
from jaxmodels.esm.model import Esm
from train import experiment
from train.data import packing, records
from train.data.families import hold_out
from train.data.masking import VERSION, Masking
from train.data.pipeline import Batches
from train.data.proteins import Protein, crops, distinct, protein_source
from train.objectives.masked_lm import MaskedLanguageModel
from train.optimizers import make_optimizer, make_schedule
from train.protein_config import ProteinPretrainConfig
from train.protein_floors import Counts, floor_sums
from train.runtime import files, flops, loop
from train.runtime.aot import Planned
from train.runtime.mesh import check_batch, make_mesh
from train.runtime.run_folder import RunFolder
from train.runtime.state import Blueprint, State, blueprint
from train.runtime.step import TrainStep

FIELDS = ("tokens", "segments", "targets")
SUMS = ("weight", "nll", "correct", "hidden_weight", "hidden_nll", "hidden_correct")


def run(cfg: ProteinPretrainConfig, folder: RunFolder) -> None:
    """Trains to the end, evaluates, writes the model and the floors; resumes where an earlier start stopped."""
    if folder.results().get("finished"):
        return
    mesh = make_mesh(cfg.mesh)
    check_batch(cfg.data.batch, cfg.loop.accumulate, mesh)  # before the data are prepared
    encoder = cfg.model.encoder()
    plan = make_plan(cfg, encoder, mesh)
    data = prepare_data(cfg, folder)
    about = files.read_json(data / "about.json") or {}
    folder.write_results({f"data.{name}": value for name, value in about.items()} | floors(cfg, folder, data))
    task = loop.Task(
        plan, train_step(cfg, plan, encoder), open_batches(cfg, data, "train"), batch_shapes(cfg),
        cfg.data.batch * cfg.data.length,
        flops.encoder_train_flops_per_token(encoder, about["mean_keys"]) * cfg.data.batch * cfg.data.length,
        make_evaluation(cfg, plan, encoder, mesh, data))
    finish(cfg, folder, plan, encoder, about["mean_keys"], experiment.train(cfg, folder, task, mesh))


def make_plan(cfg: ProteinPretrainConfig, encoder: EsmConfig, mesh: Mesh) -> Blueprint:
    """The state of the run on a mesh."""
    optimizer = make_optimizer(cfg.optimizer, cfg.loop.steps)
    return blueprint(lambda key: Esm(encoder, rngs=nnx.Rngs(params=key)), optimizer, mesh, seed=cfg.seed)


def train_step(cfg: ProteinPretrainConfig, plan: Blueprint, encoder: EsmConfig) -> TrainStep:
    optimizer = make_optimizer(cfg.optimizer, cfg.loop.steps)
    return TrainStep(plan.graphdef, MaskedLanguageModel(encoder.mask_id), optimizer, cfg.loop.accumulate,
                     make_schedule(cfg.optimizer, cfg.loop.steps))


def batch_shapes(cfg: ProteinPretrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """One global batch."""
    return dict.fromkeys(FIELDS, jax.ShapeDtypeStruct((cfg.data.batch, cfg.data.length), np.int32))


def plan_step(cfg: ProteinPretrainConfig, mesh: Mesh) -> Planned:
    """The step that `run` would run on `mesh`, lowered and not compiled; reads no data."""
    encoder = cfg.model.encoder()
    plan = make_plan(cfg, encoder, mesh)
    cost = flops.encoder_train_flops_per_token(encoder, cfg.data.length)  # as if every row held one protein
    return experiment.plan_step(cfg, plan, train_step(cfg, plan, encoder), batch_shapes(cfg), cost, mesh)


# Data


def prepare_data(cfg: ProteinPretrainConfig, folder: RunFolder) -> Path:
    """Packed records and ``about.json``, in a ``data-*`` folder of the run (or its sweep)."""
    about = {"seed": cfg.seed, **{key: getattr(cfg.data, key) for key in ("source", "length", "crop", "limit")}}
    return experiment.prepared(folder, about, functools.partial(_prepare, cfg, folder))


def _prepare(cfg: ProteinPretrainConfig, folder: RunFolder, data: Path) -> None:
    read, counts = protein_source(cfg.data.source)
    proteins = distinct(read)
    counts["duplicates"] = len(read) - len(proteins)
    if cfg.data.limit:
        proteins = proteins[:cfg.data.limit]
    parts = dict(zip(("train", "validation"), hold_out(proteins), strict=True))
    for split, members in parts.items():
        if not members:
            raise UserError(f"data.source={cfg.data.source} has no {split} proteins: it needs two families that share "
                            "no word of 8 residues; give more proteins")
    folder.check_stop()
    packed, queries, keys = {}, 0, 0
    for split, members in parts.items():
        rows = [ids for protein in members for ids in _rows(protein, cfg)]
        packed[split] = packing.pack_whole(rows, cfg.data.length, PAD, cfg.seed)
        del packed[split]["documents"]
        counts |= {f"{split}_proteins": len(members), f"{split}_rows": len(packed[split]["tokens"]),
                   f"{split}_residues": sum(len(protein.sequence) for protein in members)}
        if split == "train":
            sizes = np.array([len(ids) for ids in rows], float)
            queries, keys = sizes.sum(), (sizes**2).sum()
            counts["padding"] = float((packed[split]["segments"] == 0).mean())
    about = counts | {"mean_keys": keys / queries} | _overlap({protein.sequence for protein in proteins})
    files.write_json(data / "about.json", about)
    records.prepare(data, packed)


def _rows(protein: Protein, cfg: ProteinPretrainConfig) -> list[np.ndarray]:
    """A protein as ids: one row's worth, or pieces of it."""
    return [encode(piece)[0] for piece in crops(protein.sequence, min(cfg.data.crop, cfg.data.length - 2))]


def _overlap(sequences: set[str]) -> dict[str, int]:
    """How many labelled proteins, by set, are read here without their labels: leakage that results must tell."""
    found = {}
    for name in ("enzyme_ec", "care_task1"):
        with contextlib.suppress(UserError):  # sets that are not on this machine
            for protein in protein_source(name).proteins:
                key = f"overlap.{name}.{protein.split}"
                found[key] = found.get(key, 0) + (protein.sequence in sequences)
    return found


def open_batches(cfg: ProteinPretrainConfig, data: Path, split: str) -> Batches:
    """This process's part of every global batch, masked; the validation part in its own order, once."""
    masking = "masking", VERSION, Masking(cfg.masking)
    return experiment.open_batches(cfg, data, split, f"{cfg.data.source}/{split}", random_transforms=(masking,))


def _validation_batches(cfg: ProteinPretrainConfig, data: Path) -> int:
    rows = len(records.open_records(data, "validation"))
    count = min(rows, cfg.data.validation_rows) // cfg.data.batch
    if count == 0:
        raise UserError(f"the validation part has {rows} rows, less than data.batch={cfg.data.batch}; lower data.batch")
    return count


def make_evaluation(cfg: ProteinPretrainConfig, plan: Blueprint, encoder: EsmConfig, mesh: Mesh, data: Path
                    ) -> Callable[[State, Callable[[], None]], dict[str, float]]:
    """(state, check) -> validation_loss, _perplexity, _accuracy over held-out families, and of hidden residues alone,
    if there are any.

    The questions are the same in every evaluation: the part is read once, in its order.
    """
    def numbers(total: dict[str, float]) -> dict[str, float]:
        found = {}
        for kind in kinds(total):
            loss = total[f"{kind}nll"] / total[f"{kind}weight"]
            found |= {f"validation_{kind}loss": loss, f"validation_{kind}perplexity": math.exp(loss),
                      f"validation_{kind}accuracy": total[f"{kind}correct"] / total[f"{kind}weight"]}
        return found

    return experiment.evaluator(cfg, plan, mesh, MaskedLanguageModel(encoder.mask_id), SUMS, FIELDS,
                                lambda: open_batches(cfg, data, "validation"), _validation_batches(cfg, data), numbers)


def kinds(total: dict[str, float]) -> tuple[str, ...]:
    """Of all questions, and of the hidden ones, of which masking.hidden=0 has none."""
    return ("", "hidden_") if total["hidden_weight"] else ("",)


def floors(cfg: ProteinPretrainConfig, folder: RunFolder, data: Path) -> dict[str, float]:
    """Perplexities of guessing without a network, on the questions that evaluations ask (`train.protein_floors`)."""
    counts, source = Counts(), records.open_records(data, "train")
    for start in range(0, len(source), 256):
        rows = [source[i] for i in range(start, min(start + 256, len(source)))]
        counts.add(*(np.stack([row[name] for row in rows]) for name in ("tokens", "segments")))
        folder.check_stop()
    total: dict[str, float] = {}
    rows = _validation_batches(cfg, data) * cfg.data.batch
    # Row by row, whatever the number of processes: a row's questions depend on its number alone.
    batches = Batches(records.open_records(data, "validation"), seed=cfg.seed, global_batch=1, shuffle=False, epochs=1,
                      random_transforms=(("masking", VERSION, Masking(cfg.masking)),))
    with contextlib.closing(batches):
        for _, batch in zip(range(rows), batches, strict=False):
            for name, value in floor_sums(counts, batch, cfg.masking).items():
                total[name] = total.get(name, 0.0) + value
    return {f"floor.{name}_{kind}perplexity": math.exp(total[f"{name}_{kind}nll"] / total[f"{kind}weight"])
            for name in ("unigram", "neighbours") for kind in kinds(total)}


# The end


def finish(cfg: ProteinPretrainConfig, folder: RunFolder, plan: Blueprint, encoder: EsmConfig, mean_keys: float,
           trained: loop.Trained) -> None:
    """Writes the model and the numbers of the run."""
    model = experiment.model_on_host(plan, trained.state)
    if jax.process_index() != 0:
        return
    jaxmodels.save(model, folder.dir / "model", overwrite=True)
    last = [line for line in folder.metrics() if "validation_loss" in line][-1]
    results = {name: value for name, value in last.items() if name.startswith("validation_")}
    results |= {"loss": last["loss"], "perplexity": last["perplexity"], "skipped_steps": last["skipped"]}
    cost = flops.encoder_train_flops_per_token(encoder, mean_keys)
    results |= experiment.run_numbers(trained, nnx.state(model, nnx.Param),
                                      cfg.data.batch * cfg.data.length, cost)
    known = folder.results()
    for kind in (kind for kind in ("", "hidden_") if f"validation_{kind}loss" in results):
        for floor in ("unigram", "neighbours"):
            results[f"below_{floor}_{kind}nats"] = \
                math.log(known[f"floor.{floor}_{kind}perplexity"]) - results[f"validation_{kind}loss"]
    folder.write_results(results | {"finished": True})
