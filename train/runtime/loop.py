"""The training loop: exact, resumable, and listening for signals wherever it waits (training_runtime.md).

Nothing here knows a model. A `Task` brings the state's blueprint, the step, the data and how to evaluate; the loop
brings the clock, the checkpoints and the log. What leaves the device leaves one step late, so that the device never
waits for Python.
"""

import collections
import contextlib
import dataclasses
import queue
import statistics
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmodels.errors import Interrupted, UserError
from train.data.pipeline import Batches, check_fingerprint
from train.runtime import files
from train.runtime.checkpoint import Checkpoints
from train.runtime.config import config_hash
from train.runtime.flops import mfu
from train.runtime.goodput import Goodput
from train.runtime.mesh import batch_sharding, check_batch
from train.runtime.run_folder import RunFolder
from train.runtime.signals import stop
from train.runtime.state import Blueprint, State
from train.runtime.step import TrainStep, make_step, replicate, shard_batch, unreplicate
from train.settings import LoopConfig

AHEAD = 2  # steps that may be in flight: more fills the memory of TPUs and can lock simulated devices up
WARM = 10  # first steps of a start, which step times leave out


class NonFinite(UserError):
    """Too many steps in a row had a loss or gradient that is not finite; exit code 65."""

    exit_code = 65


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained. evaluate(state, check) -> numbers; it calls check() between batches, and may be None.

    over(step): whether the run ends here, before its last step; asked before every step, so what it answers must follow
    from what is logged: a resumed run is asked again about the step that it restored.
    """

    blueprint: Blueprint
    step: TrainStep
    batches: Batches
    example: Mapping[str, jax.ShapeDtypeStruct]  # one global batch: [B, ...]
    tokens: int  # of one global batch
    flops: float  # model FLOPs of one step
    evaluate: Callable[[State, Callable[[], None]], dict[str, float]] | None = None
    over: Callable[[int], bool] | None = None


@dataclasses.dataclass(frozen=True)
class Trained:
    """How a run ended."""

    state: State
    step: int
    step_seconds: list[float]  # of this start, after the warm steps
    goodput: dict[str, Any]


class Stopped(Exception):
    """A signal, seen between two batches of an evaluation or while waiting for data."""


def train(run: RunFolder, cfg: LoopConfig, task: Task, mesh: Mesh) -> Trained:
    """Trains to step `cfg.steps`, from the newest valid checkpoint of `run` if there is one.

    Raises Interrupted (75) after a signal, everything saved; NonFinite (65); files.CannotSave (74);
    NoValidCheckpoint (66); UserError (2) for a batch that does not divide or data that changed.
    """
    loop = Loop(run, cfg, task, mesh)
    state = loop.restore()
    with loop.goodput.spend("compile"):
        compiled = loop.compile()
    pmap = cfg.style == "pmap"
    if pmap:
        state = replicate(state, mesh)
    loop.single = lambda: unreplicate(state) if pmap else state
    with run.progress(cfg.steps, "training", loop.step) as advance, contextlib.closing(loop.steps()) as steps:
        try:
            batch = next(steps)
            while True:
                with loop.stepping():
                    state, metrics = compiled(state, batch)
                advance(1, loop.note)
                batch = steps.send(metrics)
        except StopIteration as end:
            return end.value


class Loop:
    """One run. `single` gives its state, of its own and on the mesh; who drives `steps` sets it."""

    single: Callable[[], State]

    def __init__(self, run: RunFolder, cfg: LoopConfig, task: Task, mesh: Mesh):
        self.run, self.cfg, self.task, self.mesh = run, cfg, task, mesh
        self.goodput = Goodput(run.path("goodput.json") if jax.process_index() == 0 else None)
        self.checkpoints = Checkpoints(
            run.path("checkpoints"), every=cfg.save_every, keep=cfg.keep, keep_every=cfg.keep_every,
            local=_free_local_folder(run, cfg.local_dir), local_every=cfg.local_every, verify=cfg.verify)
        self.flying: collections.deque[tuple[int, int, Any]] = collections.deque()  # step, together, metrics on device
        self.step = 0
        self.same_data = 0  # the step after which the examples were those of the data that there is now
        self.held: dict[str, Any] | None = None  # metrics of a finished step that wait for its evaluation
        self.step_seconds: list[float] = []
        self.note = ""  # on the last step that has landed, for a progress bar
        self.together = 1  # runs that take the next step, see `train.runtime.together`
        self._profiling = False
        self._saves = stop.saves
        self.clock: float | None = None  # when the last step was seen to be finished
        self.wandb = _start_wandb(run) if cfg.wandb and jax.process_index() == 0 else None

    def steps(self) -> Generator[Any, Any, Trained]:
        """Yields what each step reads; is sent that step's metrics, which need not have arrived. Call `restore` before.

        A Stopped that is thrown in ends it as a signal does.
        """
        good = self.goodput
        prefetch = _Prefetch(self.task.batches, self._put)
        first = self.step
        try:
            if self.held is not None:  # the evaluation of the restored step is still due
                self._evaluate()
            while not self._over():
                if stop.at_step(self.step):
                    raise Stopped
                with good.spend("data"):
                    batch = prefetch.next()
                self._trace_profile()
                metrics = yield batch
                self.step += 1
                self.flying.append((self.step, self.together, metrics))
                with good.step(self.step):
                    self.note = self._land(AHEAD, first)
                if self._evaluates(self.step):
                    self._settle(first)
                    self._evaluate()
                if self.checkpoints.due(self.step) or self._over() or stop.saves > self._saves:
                    self._saves = stop.saves
                    self._settle(first)
                    self._save()
        except Stopped:
            self._settle(first)
            self._save(wait=True)
            self._finish()
            raise Interrupted(f"stopped by {stop.requested} at step {self.step}, which is saved; the same command "
                              "goes on") from None
        finally:
            prefetch.close()
            self._stop_profile()
        with good.spend("save"):
            self.checkpoints.wait()
        self._finish()
        return Trained(self.single(), self.step, self.step_seconds, good.summary())

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Around the next step."""
        with self.goodput.step(self.step + 1), jax.profiler.StepTraceAnnotation("train", step_num=self.step):
            yield

    # Beginning and end

    def _over(self) -> bool:
        """Whether the last step is taken."""
        return self.step >= self.cfg.steps or (self.task.over is not None and self.task.over(self.step))

    def restore(self) -> State:
        """The state to begin with: the newest valid checkpoint, or a fresh one."""
        check_batch(self.task.batches.global_batch, self.cfg.accumulate, self.mesh)
        with self.goodput.spend("restore"):
            return self._restore()

    def _restore(self) -> State:
        task = self.task
        restored = self.checkpoints.restore(task.blueprint.abstract)
        if restored is None:
            with self.goodput.spend("init"):
                state = jax.block_until_ready(task.blueprint.init())
        else:
            state, self.step, about = restored.state, restored.step, restored.metadata
            if self.step > self.cfg.steps:
                raise UserError(f"the checkpoint is at step {self.step}, loop.steps={self.cfg.steps} is before it; "
                                "raise loop.steps or choose another --out")
            data = task.batches.fingerprint()
            seen = check_fingerprint(about["data"], data, self.cfg.on_change)
            self.same_data = 0 if about["data"] == data else self.step
            task.batches.seek(about["examples_seen"] if seen is None else seen)
            self.held = about.get("held")
        self.run.truncate_metrics(self.step if self.held is None else self.step - 1)
        self.begin = self.step, task.batches.state()["next_batch"]
        return state

    def compile(self) -> Callable:
        """The step, compiled for the one shape there is, so that its memory is known before the first batch."""
        task, cfg = self.task, self.cfg
        step = make_step(task.step, task.blueprint, self.mesh, cfg.style)
        if cfg.style == "pmap":
            return step
        batch = abstract_batch(task.example, self.mesh, cfg.accumulate)
        compiled = step.lower(task.blueprint.abstract, batch).compile()
        tell_memory(compiled, "a step")
        return compiled

    def _finish(self) -> None:
        self.goodput.write()
        if self.wandb is not None:
            self.wandb.finish()

    # One step

    def _put(self, batch: dict[str, np.ndarray]) -> Any:
        """This process's rows onto the devices, as a part of the global batch."""
        batch = {name: batch[name] for name in self.task.example}
        parts = {name: a.reshape(_micro(a.shape, self.cfg.accumulate)) for name, a in batch.items()}
        if self.cfg.style == "pmap":
            return shard_batch(parts, self.mesh, self.cfg.accumulate)
        sharding = batch_sharding(self.mesh, self.cfg.accumulate)
        return {name: jax.make_array_from_process_local_data(sharding, a) for name, a in parts.items()}

    def _land(self, keep: int, first: int) -> str:
        """Waits until at most `keep` steps are in flight and logs those that have landed; returns a progress note."""
        note = ""
        while len(self.flying) > keep:
            step, together, metrics = self.flying.popleft()
            values = jax.device_get(metrics)
            now = time.monotonic()
            seconds = None if self.clock is None else now - self.clock
            self.clock = now
            line = {name: v.item() for name, v in values.items() if np.ndim(v) == 0}
            if self._evaluates(step):  # arrays only now and then
                line |= {name: v.tolist() for name, v in values.items() if np.ndim(v)}
            line["step"] = step
            if seconds is not None and step > first + WARM:
                self.step_seconds.append(seconds)
            if seconds:
                line |= {"step_seconds": seconds, "tokens_per_second": self.task.tokens / seconds}
                share = mfu(self.task.flops, seconds, self.mesh.devices.size, self.mesh.devices.flat[0])
                line |= {"mfu": share} if share is not None else {}
            if together > 1:
                line["together"] = together
            if self.cfg.log_ids:
                line["ids"] = self._ids(step).tolist()
            if self.checkpoints.failures:
                line["failed_saves"] = self.checkpoints.failures
            self.goodput.reached(step)
            note = _note(line)
            if line["bad"] >= self.cfg.max_bad_steps:
                self._give_up(line)
            if self._evaluates(step):
                self.held = line  # one line a step: it waits for the evaluation's numbers
            else:
                self._log(line)
        return note

    def _settle(self, first: int) -> None:
        """Waits for every step in flight; that time is theirs."""
        with self.goodput.step(self.step):
            self._land(0, first)

    def _evaluates(self, step: int) -> bool:
        due = step % self.cfg.evaluate_every == 0 or step == self.cfg.steps
        return due and self.task.evaluate is not None

    def _ids(self, step: int) -> np.ndarray:
        """Ids of the examples of a step."""
        return self.task.batches.global_ids(self._batch_of(step))

    def _batch_of(self, step: int) -> int:
        """Number of a step's batch in the order of the data, which on_change=restart may have set back."""
        step0, batch0 = self.begin
        return batch0 + step - 1 - step0

    def _log(self, line: dict[str, Any]) -> None:
        self.held = None
        step = line["step"]
        self.run.log(**line)
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in line.items() if isinstance(v, (int, float))}, step=step)

    def _give_up(self, line: dict[str, Any]) -> None:
        """Everything is logged and the examples of the bad steps are named before the run ends."""
        step, bad = line["step"], line["bad"]
        ids = {str(s): self._ids(s).tolist() for s in range(max(step - bad, self.same_data) + 1, step + 1)}
        self._log(line)
        if jax.process_index() == 0:
            files.write_json(self.run.path("bad_examples.json"), {"ids_by_step": ids})
        self.flying.clear()
        self._finish()
        raise NonFinite(f"loss or gradient not finite in {bad} steps in a row, up to step {step} (limit "
                        f"{self.cfg.max_bad_steps}); their examples are in {self.run.dir / 'bad_examples.json'}: "
                        "lower optimizer.learning_rate or remove them")

    # Evaluation, checkpoints, profiler

    def _evaluate(self) -> None:
        def check() -> None:
            if stop.requested and not stop.distributed:
                raise Stopped  # what was evaluated so far is dropped; the step's line waits in `held`

        with self.goodput.spend("evaluation"):
            found = self.task.evaluate(self.single(), check)
        self._log({**self.held, **found})
        self.clock = None

    def _save(self, wait: bool = False) -> None:
        """Hands the state to the checkpoint writer. A held line goes with it: a resumed run evaluates and logs it."""
        batches = self.task.batches
        examples = batches.examples_before(self._batch_of(self.step) + 1)  # not what the prefetcher has read
        with self.goodput.spend("save"):
            self.checkpoints.save(self.step, self.single(), {
                "data": batches.fingerprint(), "examples_seen": examples, "held": self.held,
                "config": self.run.config, "mesh": dict(self.mesh.shape), "processes": jax.process_count(),
            }, wait=wait)
        self.goodput.write()
        self.clock = None

    def _trace_profile(self) -> None:
        if self.cfg.profile is None:
            return
        start, count = self.cfg.profile
        if self.step == start:
            jax.profiler.start_trace(str(self.run.path("profile")), profiler_options=jax.profiler.ProfileOptions())
            self._profiling = True
        elif self.step == start + count:
            self._stop_profile()

    def _stop_profile(self) -> None:
        if self._profiling:
            jax.block_until_ready(self.single())
            jax.profiler.stop_trace()
            self._profiling = False


class _Prefetch:
    """One batch ahead, on a thread of its own: waiting for data can be interrupted, and copying costs no step time."""

    def __init__(self, batches: Batches, put: Callable[[dict[str, np.ndarray]], Any]):
        self._batches, self._put = batches, put
        self._ready: queue.Queue = queue.Queue(1)
        self._closed = False
        # A daemon: a process that is told to end must not wait for a file system that has gone away.
        threading.Thread(target=self._work, name="data", daemon=True).start()

    def next(self) -> Any:
        """The next batch. Raises Stopped if a signal comes while it is not there."""
        while True:
            try:
                batch, error = self._ready.get(timeout=0.1)
                break
            except queue.Empty:
                if stop.requested and not stop.distributed:
                    raise Stopped from None
        if error is not None:
            raise error
        return batch

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(queue.Empty):
            self._ready.get_nowait()  # the thread may be waiting for room

    def _work(self) -> None:
        while not self._closed:
            try:
                item = self._put(next(self._batches)), None
            except BaseException as error:  # StopIteration too: the loop asked for more than there is
                item = None, error
            self._ready.put(item)
            if item[1] is not None:
                return


def tell_memory(compiled: Any, what: str) -> None:
    memory, mib = compiled.memory_analysis(), 2 ** -20
    if memory is not None and jax.process_index() == 0:
        print(f"memory of {what}, per device: state and batch {memory.argument_size_in_bytes * mib:.0f} MiB, "
              f"temporary {memory.temp_size_in_bytes * mib:.0f} MiB", file=sys.stderr)


def step_time(seconds: list[float]) -> dict[str, float]:
    """Median and 95th percentile of step times; empty for fewer than two."""
    if len(seconds) < 2:
        return {}
    return {"step_seconds_median": statistics.median(seconds), "step_seconds_p95": float(np.quantile(seconds, 0.95))}


def abstract_batch(example: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh, accumulate: int) -> dict[str, Any]:
    """What a step takes for a global batch of these shapes: cut into micro-batches and over the mesh."""
    sharding = batch_sharding(mesh, accumulate)
    return {name: jax.ShapeDtypeStruct(_micro(s.shape, accumulate), s.dtype, sharding=sharding)
            for name, s in example.items()}


def _micro(shape: tuple[int, ...], accumulate: int) -> tuple[int, ...]:
    return shape if accumulate == 1 else (accumulate, shape[0] // accumulate, *shape[1:])


def _note(line: dict[str, Any]) -> str:
    parts = [f"loss {line['loss']:.3f}"] if "loss" in line else []
    if "tokens_per_second" in line:
        parts += [f"{line['step_seconds']:.2f} s/step", f"{line['tokens_per_second']:,.0f} tokens/s"]
    return ", ".join([*parts, *([f"MFU {line['mfu']:.1%}"] if "mfu" in line else [])])


def local_folder(run: RunFolder, local_dir: str) -> Path:
    """A run's own place in loop.local_dir, which other runs, or trials of a sweep, are told too."""
    return Path(local_dir) / f"{run.dir.name}-{config_hash({'run': str(run.dir.absolute())})}"


def _free_local_folder(run: RunFolder, local_dir: str | None) -> Path | None:
    """`local_folder`, if there is one.

    Raises UserError if it holds checkpoints though the run has logged nothing: its folder was removed, they were not.
    """
    if not local_dir:
        return None
    folder = local_folder(run, local_dir)
    if run.writes and not run.metrics() and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} holds checkpoints of an earlier run in {run.dir}, which begins anew; remove it, or "
                        "choose another loop.local_dir")
    return folder


def _start_wandb(run: RunFolder) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("loop.wandb=true needs the wandb package; pip install wandb, or leave it false") from None
    return wandb.init(dir=str(run.dir), name=run.dir.name, config=run.config, resume="allow")
