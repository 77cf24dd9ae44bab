"""Pre-training a language model from random weights: data, model, loop, and what is left when it is done."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import jaxmodels
from jaxmodels.decoder.config import DecoderConfig
from jaxmodels.decoder.generate import Sampling, generate
from jaxmodels.decoder.model import Decoder
from jaxmodels.errors import UserError
from jaxmodels.hub.tokenizer import Tokenizer
from train import experiment
from train.data import bpe, packing, records
from train.data.pipeline import Batches
from train.data.python_source import documents
from train.objectives.language_model import LanguageModel
from train.optimizers import make_optimizer, make_schedule
from train.pretrain_config import PretrainConfig
from train.quantize import quantize
from train.runtime import flops, loop
from train.runtime.aot import Planned
from train.runtime.mesh import check_batch, make_mesh
from train.runtime.run_folder import RunFolder
from train.runtime.state import Blueprint, State, blueprint
from train.runtime.step import TrainStep

PROMPTS = ("def ", "import os\n\n", "class ", '    """Return ', "for i in range(", "if __name__ == ")
FIELDS = ("tokens", "segments", "bytes")


def run(cfg: PretrainConfig, folder: RunFolder) -> None:
    """Trains to the end, evaluates, writes samples and the model; resumes where an earlier start stopped."""
    if folder.results().get("finished"):
        return
    mesh = make_mesh(cfg.mesh)
    check_batch(cfg.data.batch, cfg.loop.accumulate, mesh)  # before minutes of preparing data
    decoder = cfg.model.decoder(cfg.data.vocab_size, cfg.data.length)
    plan = make_plan(cfg, decoder, mesh)
    data = prepare_data(cfg, folder)
    tokenizer = Tokenizer(bpe.load(data / "tokenizer.json"), eos_id=bpe.EOS, pad_id=bpe.EOS)
    batches = open_batches(cfg, data, "train")
    task = loop.Task(
        plan, train_step(cfg, plan, decoder), batches, batch_shapes(cfg), cfg.data.batch * cfg.data.length,
        flops.train_flops_per_token(decoder, cfg.data.length) * cfg.data.batch * cfg.data.length,
        make_evaluation(cfg, plan, decoder, mesh, data))
    finish(cfg, folder, plan, decoder, tokenizer, experiment.train(cfg, folder, task, mesh))


def make_plan(cfg: PretrainConfig, decoder: DecoderConfig, mesh: Mesh) -> Blueprint:
    """The state of the run on a mesh."""
    optimizer = make_optimizer(cfg.optimizer, cfg.loop.steps)
    return blueprint(lambda key: build_model(cfg, decoder, key), optimizer, mesh, seed=cfg.seed)


def build_model(cfg: PretrainConfig, decoder: DecoderConfig, key: jax.Array) -> Decoder:
    model = Decoder(decoder, rngs=nnx.Rngs(params=key))
    return model if cfg.model.quantize == "none" else quantize(model, cfg.model.quantize)


def train_step(cfg: PretrainConfig, plan: Blueprint, decoder: DecoderConfig) -> TrainStep:
    optimizer = make_optimizer(cfg.optimizer, cfg.loop.steps)
    return TrainStep(plan.graphdef, LanguageModel(decoder, cfg.balance), optimizer, cfg.loop.accumulate,
                     make_schedule(cfg.optimizer, cfg.loop.steps))


def batch_shapes(cfg: PretrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """One global batch."""
    B, T = cfg.data.batch, cfg.data.length
    rows = jax.ShapeDtypeStruct((B, T), np.int32)
    return {"tokens": rows, "segments": rows, "bytes": jax.ShapeDtypeStruct((B,), np.int32)}


def plan_step(cfg: PretrainConfig, mesh: Mesh) -> Planned:
    """The step that `run` would run on `mesh`, lowered and not compiled; reads no data."""
    decoder = cfg.model.decoder(cfg.data.vocab_size, cfg.data.length)
    plan = make_plan(cfg, decoder, mesh)
    return experiment.plan_step(cfg, plan, train_step(cfg, plan, decoder), batch_shapes(cfg),
                                flops.train_flops_per_token(decoder, cfg.data.length), mesh)


# Data


def prepare_data(cfg: PretrainConfig, folder: RunFolder) -> Path:
    """Tokenizer and packed records, in a ``data-*`` folder of the run (or its sweep); made once a disk."""
    about = {"seed": cfg.seed, **{key: getattr(cfg.data, key) for key in ("source", "vocab_size", "length")}}
    return experiment.prepared(folder, about, functools.partial(_prepare, cfg, folder))


def _prepare(cfg: PretrainConfig, folder: RunFolder, data: Path) -> None:
    parts = {split: documents(cfg.data.source, split) for split in ("train", "validation")}
    for split, docs in parts.items():
        if not docs:
            raise UserError(f"data.source={cfg.data.source} has no {split} documents; give more text")
    tokenizer = bpe.train((doc.text for doc in parts["train"]), cfg.data.vocab_size)
    if tokenizer.get_vocab_size() != cfg.data.vocab_size:
        raise UserError(f"data.vocab_size={cfg.data.vocab_size}: the text gives only {tokenizer.get_vocab_size()} "
                        "tokens; lower it or give more text")
    bpe.save(tokenizer, data / "tokenizer.json")
    sizes, packed = bpe.token_bytes(tokenizer), {}
    for split, docs in parts.items():
        ids = bpe.encode(tokenizer, [doc.text for doc in docs])
        packed[split] = packing.pack(ids, cfg.data.length, bpe.EOS, sizes, cfg.seed)
        folder.check_stop()
    records.prepare(data, packed)


def open_batches(cfg: PretrainConfig, data: Path, split: str) -> Batches:
    """This process's part of every global batch; the validation part in its own order, once."""
    return experiment.open_batches(cfg, data, split, f"{cfg.data.source}/{split}")


def make_evaluation(cfg: PretrainConfig, plan: Blueprint, decoder: DecoderConfig, mesh: Mesh, data: Path
                    ) -> Callable[[State, Callable[[], None]], dict[str, float]]:
    """(state, check) -> validation_loss, validation_bits_per_byte, validation_accuracy over the held-out packages."""
    rows = len(records.open_records(data, "validation"))
    count = min(rows, cfg.data.validation_rows) // cfg.data.batch
    if count == 0:
        raise UserError(f"the validation part has {rows} rows, less than data.batch={cfg.data.batch}; lower data.batch")

    def numbers(total: dict[str, float]) -> dict[str, float]:
        return {"validation_loss": total["nll"] / total["weight"],
                "validation_bits_per_byte": total["nll"] / math.log(2) / total["bytes"],
                "validation_accuracy": total["correct"] / total["weight"]}

    return experiment.evaluator(cfg, plan, mesh, LanguageModel(decoder, cfg.balance),
                                ("weight", "nll", "correct", "bytes"), FIELDS,
                                lambda: open_batches(cfg, data, "validation"), count, numbers)


# The end


def finish(cfg: PretrainConfig, folder: RunFolder, plan: Blueprint, decoder: DecoderConfig, tokenizer: Tokenizer,
           trained: loop.Trained) -> None:
    """Writes the model, its samples and the numbers of the run."""
    model = experiment.model_on_host(plan, trained.state)
    if jax.process_index() != 0:
        return
    jaxmodels.save(model, folder.dir / "model", extra_files=tokenizer.files(), overwrite=True)
    texts = write_samples(cfg, jaxmodels.load(folder.dir / "model", scan_layers=False), tokenizer)
    last = [line for line in folder.metrics() if "validation_loss" in line][-1]
    results = {name: last[name] for name in
               ("validation_loss", "validation_bits_per_byte", "validation_accuracy", "loss", "bits_per_byte")}
    results |= {k: v for k, v in last.items() if k.startswith("router.") and not isinstance(v, list)}
    results |= experiment.run_numbers(trained, nnx.state(model, nnx.Param), cfg.data.batch * cfg.data.length,
                                      flops.train_flops_per_token(decoder, cfg.data.length))
    results |= {"active_parameters": flops.active_matmul_parameters(decoder), "skipped_steps": last["skipped"],
                "samples": texts, "finished": True}
    folder.write_results(results)


def write_samples(cfg: PretrainConfig, model: Decoder, tokenizer: Tokenizer) -> list[str]:
    """What the model writes after a few openings."""
    if not cfg.samples:
        return []
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(cfg.samples)]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    room = max(cfg.data.length - max(map(len, ids)), 1)
    rows = generate(model, ids, min(room, 160), sampling=Sampling(temperature=0.8, top_p=0.95), seed=cfg.seed,
                    stop_ids=(0,))
    return [prompt + tokenizer.decode(row) for prompt, row in zip(prompts, rows, strict=True)]
