"""What every training experiment does around the loop: data prepared once a disk, evaluation, the numbers at the end.

`cfg` is an experiment's config; its groups `data` (batch, length), `loop` and `mesh` are read here.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmodels.errors import Interrupted, UserError
from train.data import records
from train.data.pipeline import Batches
from train.runtime import flops, loop
from train.runtime.aot import Planned
from train.runtime.config import config_hash
from train.runtime.mesh import batch_sharding, check_batch, replicated, use_mesh
from train.runtime.run_folder import RunFolder
from train.runtime.state import Blueprint, State, path_text
from train.runtime.step import Objective, TrainStep, make_step
from train.runtime.together import train_together

Shapes = Mapping[str, jax.ShapeDtypeStruct]
DATA = "data.sha256"  # in the results of a run: the digest of what it reads


def train(cfg: Any, folder: RunFolder, task: loop.Task, mesh: Mesh) -> loop.Trained:
    """`loop.train` on the mesh, in the way that the style needs."""
    if cfg.loop.style == "pmap":
        return loop.train(folder, cfg.loop, task, mesh)
    with use_mesh(mesh, parts=cfg.mesh.parts, ragged=cfg.mesh.ragged):
        return loop.train(folder, cfg.loop, task, mesh)


class Trial(Protocol):
    """A run that is ready to be trained."""

    cfg: Any
    folder: RunFolder
    task: loop.Task
    mesh: Mesh


def run(cfg: Any, folder: RunFolder, prepare: Callable[[Any, RunFolder], Trial],
        finish: Callable[[Any, loop.Trained], None]) -> None:
    """``prepare(cfg, folder)``, training, ``finish(trial, trained)``; nothing where the results say `finished`."""
    if not folder.results().get("finished"):
        trial = prepare(cfg, folder)
        finish(trial, train(trial.cfg, folder, trial.task, trial.mesh))


def run_together(cfgs: Sequence[Any], folders: Sequence[RunFolder], prepare: Callable[[Any, RunFolder], Trial],
                 finish: Callable[[Any, loop.Trained], None]) -> list[Exception | None]:
    """`run` of several that differ in their seeds, trained in lockstep. Returns what each failed with, None for none.

    Raises Interrupted before the training, and UserError for runs that cannot be trained together.
    """
    ends: list[Exception | None] = [None] * len(cfgs)
    trials = {}
    for place, (cfg, folder) in enumerate(zip(cfgs, folders, strict=True)):
        try:
            if not folder.results().get("finished"):
                trials[place] = prepare(cfg, folder)
        except Interrupted:
            raise
        except Exception as error:
            ends[place] = error
    if not trials:
        return ends
    first = next(iter(trials.values()))
    with use_mesh(first.mesh, parts=first.cfg.mesh.parts, ragged=first.cfg.mesh.ragged):
        trained = train_together([trial.folder for trial in trials.values()],
                                 [trial.cfg.loop for trial in trials.values()],
                                 [trial.task for trial in trials.values()], first.mesh)
    for (place, trial), end in zip(trials.items(), trained, strict=True):
        try:
            if isinstance(end, Exception):
                raise end
            finish(trial, end)
        except Exception as error:
            ends[place] = error
    return ends


def check_data(folder: RunFolder, digest: str, what: str) -> None:
    """Raises UserError if a run was begun with other data. Its results take the digest, as `DATA`, when it begins."""
    if folder.results().get(DATA, digest) != digest:
        raise UserError(f"{what} have changed since {folder.dir} was begun with them; put the old ones back, or "
                        "train in another folder")


def check_epochs(cfg: Any) -> None:
    """Raises UserError for keys of the loop that nothing reads where the epochs say how long a run takes."""
    for key in ("steps", "evaluate_every"):
        if getattr(cfg.loop, key) != 1:
            raise UserError(f"loop.{key}={getattr(cfg.loop, key)}: steps are made of the epochs here, and every epoch "
                            "is evaluated; leave it out, and set epochs")


def plan_step(cfg: Any, plan: Blueprint, step: TrainStep, shapes: Shapes, flops_per_token: float, mesh: Mesh
              ) -> Planned:
    """The step that a run would take on `mesh`, lowered and not compiled; reads no data."""
    check_batch(cfg.data.batch, cfg.loop.accumulate, mesh)
    compiled = make_step(step, plan, mesh, cfg.loop.style)
    lowered = compiled.lower(plan.abstract, loop.abstract_batch(shapes, mesh, cfg.loop.accumulate))
    tokens = cfg.data.batch * cfg.data.length
    parameters = {path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(plan.abstract["params"])}
    return Planned(lowered, parameters, flops_per_token * tokens, tokens)


def prepared(folder: RunFolder, about: Mapping[str, Any], prepare: Callable[[Path], None]) -> Path:
    """The ``data-*`` folder of the run (or its sweep) where ``prepare(path)`` has written records; once a disk.

    about: what the records depend on, as JSON values; it names the folder.
    """
    data = folder.shared / f"data-{config_hash(about)}"
    if jax.process_index() == 0 and not records.is_prepared(data):
        with folder.alone(data):
            if not records.is_prepared(data):
                prepare(data)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("data prepared")
        if not records.is_prepared(data):  # a host with a disk of its own: the same source gives the same files
            prepare(data)
    return data


def open_batches(cfg: Any, data: Path, split: str, name: str, **transforms: Any) -> Batches:
    """`batches_of` a prepared split; training shuffled for ever, others once in order."""
    return batches_of(cfg, records.open_records(data, split), name, split == "train", **transforms)


def batches_of(cfg: Any, source: Any, name: str, train: bool = True, **transforms: Any) -> Batches:
    """This process's part of every global batch of records. transforms: as `Batches` takes them."""
    return Batches(source, seed=cfg.seed, global_batch=cfg.data.batch, shuffle=train, epochs=None if train else 1,
                   process_index=jax.process_index(), process_count=jax.process_count(), name=name,
                   files=source.files, **transforms)


def evaluator(cfg: Any, plan: Blueprint, mesh: Mesh, objective: Objective, sums: Sequence[str], fields: Iterable[str],
              batches: Callable[[], Batches], count: int,
              numbers: Callable[[dict[str, float]], dict[str, float]]
              ) -> Callable[[State, Callable[[], None]], dict[str, float]]:
    """(state, check) -> ``numbers(total of the objective's sums over the first `count` batches)``.

    fields: what of a batch goes to the device. check() is called before every batch.
    """
    fields = tuple(fields)

    def score(params: Any, rest: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        found = objective.loss(nnx.merge(plan.graphdef, nnx.State(params), nnx.State(rest)), batch, None)[1]
        return {name: found[name] for name in sums}

    if cfg.loop.style == "pmap":
        compiled, put = jax.jit(score), lambda a: a
    else:
        compiled = jax.jit(score, out_shardings=replicated(mesh))
        put = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))

    def evaluate(state: State, check: Callable[[], None]) -> dict[str, float]:
        total = dict.fromkeys(sums, 0.0)
        with contextlib.closing(batches()) as opened:
            for _, batch in zip(range(count), opened, strict=False):
                check()
                placed = {name: put(batch[name]) for name in fields}
                found = jax.device_get(compiled(state["params"], state["rest"], placed))
                total = {name: total[name] + float(found[name]) for name in total}
        return numbers(total)

    return evaluate


def model_on_host(plan: Blueprint, state: State) -> Any:
    """The model that a state holds, in this host's memory; all processes call it together."""
    params, rest = on_host(state["params"]), on_host(state["rest"])
    return nnx.merge(plan.graphdef, nnx.State(params), nnx.State(rest))


def on_host(tree: Any) -> Any:
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def run_numbers(trained: loop.Trained, parameters: Any, tokens: int, flops_per_token: float) -> dict[str, Any]:
    """What every run's results tell: steps, tokens, parameters, goodput, step time, tokens a second, MFU.

    tokens: of one global batch. parameters: the tree of them.
    """
    results = {
        "steps": trained.step, "tokens": trained.step * tokens,
        "parameters": sum(int(np.size(p)) for p in jax.tree.leaves(parameters)), "flops_per_token": flops_per_token,
        "goodput": trained.goodput["goodput"], "devices": jax.device_count(), **loop.step_time(trained.step_seconds),
    }
    if "step_seconds_median" in results:
        results["tokens_per_second"] = tokens / results["step_seconds_median"]
        share = flops.mfu(flops_per_token * tokens, results["step_seconds_median"], jax.device_count(),
                          jax.devices()[0])
        results |= {"mfu": share} if share is not None else {}
    return results
