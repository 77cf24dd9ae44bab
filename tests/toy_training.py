"""A training experiment for the tests: small models, and things that go wrong when asked to.

    jaxmodels run tests.toy_training family=perceptron loop.steps=20 slow=evaluation
"""

import dataclasses
import time
from typing import Literal

import jax
import numpy as np
import optax
from flax import nnx

from jaxmodels.decoder.config import DecoderConfig, ExpertConfig
from jaxmodels.decoder.model import Decoder
from tests.tiny_training import Perceptron, Regression
from train.data.pipeline import Batches
from train.objectives.language_model import LanguageModel
from train.runtime import loop
from train.runtime.mesh import make_mesh, use_mesh
from train.runtime.state import blueprint
from train.runtime.step import TrainStep
from train.settings import BalanceConfig, LoopConfig, MeshConfig

LENGTH = 12


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    family: Literal["perceptron", "decoder", "moe"] = "perceptron"
    batch: int = 8
    records: int = 50
    slow: Literal["none", "step", "evaluation", "data"] = "none"  # where a second (data: a minute) is lost
    nan_from: int = -1  # first batch (from 0) with a value that is not a number
    nan_batches: int = 1
    nap: float = 0.0  # seconds that every record takes
    mesh: MeshConfig = MeshConfig(data=1)
    loop: LoopConfig = LoopConfig(steps=20, evaluate_every=10, save_every=5, log_ids=True)
    seed: int = 0
    entry: str = "tests.toy_training:run"
    report: str = "analysis.training_report:build"

    @property
    def operational(self):
        changed = ("batch", "seed", "records") if self.loop.on_change != "raise" else ()
        names = ("on_change", "save_every", "local_dir", "local_every", "max_bad_steps", "verify", "style")
        return ("mesh", "slow", "nap", *(f"loop.{name}" for name in names), *changed)


def get_config():
    return ToyConfig()


class Records:
    """Rows that depend on their index alone; `stall` after so many reads."""

    def __init__(self, cfg):
        self.cfg, self.reads = cfg, 0

    def __len__(self):
        return self.cfg.records

    def __getitem__(self, index):
        self.reads += 1
        time.sleep(self.cfg.nap)
        if self.cfg.slow == "data" and self.reads > 10 * self.cfg.batch:
            time.sleep(60)
        r = np.random.default_rng(index)
        if self.cfg.family == "perceptron":
            return {"x": r.normal(size=8).astype(np.float32), "y": r.normal(size=4).astype(np.float32),
                    "mask": np.bool_(index % 7 > 0)}
        segments = np.where(np.arange(LENGTH) < r.integers(4, LENGTH), 1, 2).astype(np.int32)
        return {"tokens": r.integers(0, 96, LENGTH).astype(np.int32), "segments": segments, "bytes": np.int32(20)}


def decoder(cfg):
    experts = ExpertConfig(8, 2, balance_bias=True) if cfg.family == "moe" else None
    return DecoderConfig.tiny(vocab_size=96, ffn_widths=(16, 16), experts=experts)


def pieces(cfg, mesh):
    """(blueprint, step, example)."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0),
                            optax.adamw(optax.cosine_decay_schedule(1e-2, cfg.loop.steps)))
    if cfg.family == "perceptron":
        plan = blueprint(Perceptron, optimizer, mesh, seed=cfg.seed)
        objective = Regression()
        example = {"x": ((8,), np.float32), "y": ((4,), np.float32), "mask": ((), np.bool_)}
    else:
        plan = blueprint(lambda key: Decoder(decoder(cfg), rngs=nnx.Rngs(params=key)), optimizer, mesh, seed=cfg.seed)
        objective = LanguageModel(decoder(cfg), BalanceConfig(bias_rate=0.01, loss=0.01))
        example = {"tokens": ((LENGTH,), np.int32), "segments": ((LENGTH,), np.int32), "bytes": ((), np.int32)}
    example = {name: jax.ShapeDtypeStruct((cfg.batch, *shape), kind) for name, (shape, kind) in example.items()}
    return plan, TrainStep(plan.graphdef, objective, optimizer, cfg.loop.accumulate), example


def open_batches(cfg):
    options = {"seed": cfg.seed, "global_batch": cfg.batch, "process_index": jax.process_index(),
               "process_count": jax.process_count(), "name": "toy"}
    poisoned = []
    if cfg.nan_from >= 0:
        clean = Batches(Records(cfg), **options)
        ids = {int(i) for k in range(cfg.nan_batches) for i in clean.global_ids(cfg.nan_from + k)}
        poisoned = [Records(cfg)[i]["x"] for i in ids]
        clean.close()

    def poison(record):  # a transform sees no id: rows are told by their content
        bad = any(np.array_equal(record["x"], x) for x in poisoned)
        return {**record, "x": record["x"] * np.float32(np.nan), "mask": np.bool_(True)} if bad else record

    return Batches(Records(cfg), transforms=(("poison", 1, poison),) if poisoned else (), **options)


def mesh_of(cfg):
    return make_mesh(cfg.mesh, jax.devices() if jax.process_count() > 1 else jax.devices()[:abs(cfg.mesh.data) *
                     cfg.mesh.fsdp * cfg.mesh.expert * cfg.mesh.tensor])


def task_of(cfg, mesh, on_evaluate=lambda state: None):
    plan, step, example = pieces(cfg, mesh)

    def evaluate(state, check):
        on_evaluate(state)
        for _ in range(20 if cfg.slow == "evaluation" else 1):
            check()
            time.sleep(1 if cfg.slow == "evaluation" else 0)
        return {"validation_loss": float(state["step"])}

    task = loop.Task(plan, step, open_batches(cfg), example, cfg.batch, 1e6, evaluate)
    return dataclasses.replace(task, batches=_Slow(task.batches)) if cfg.slow == "step" else task


def run(cfg, folder, on_evaluate=lambda state: None):
    mesh = mesh_of(cfg)
    task = task_of(cfg, mesh, on_evaluate)
    with use_mesh(mesh):
        trained = loop.train(folder, cfg.loop, task, mesh)
    folder.write_results({"finished": True, "steps": trained.step})
    return trained


class _Slow:
    """Batches that take a second each: signals find the loop between two steps."""

    def __init__(self, batches):
        self.inner = batches

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __next__(self):
        time.sleep(1)
        return next(self.inner)
