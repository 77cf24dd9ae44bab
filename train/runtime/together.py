"""Several runs of equal shape, trained in lockstep: one step is the steps of all, under vmap.

Each keeps what it has alone (`train.runtime.loop`): its folder, its order of data, evaluations, checkpoints and end.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmodels.errors import UserError
from train.runtime.loop import AHEAD, Loop, Stopped, Task, Trained, abstract_batch, tell_memory
from train.runtime.run_folder import RunFolder
from train.runtime.signals import stop
from train.runtime.step import Stacked, make_step_together, stacked_abstract
from train.settings import LoopConfig

ROOM = 0.8  # share of a device's free memory that a step may take: evaluations and saves need some
ALONE = {"style": "auto", "local_dir": None, "profile": None, "wandb": False}  # what the others of LoopConfig need


def train_together(runs: Sequence[RunFolder], cfgs: Sequence[LoopConfig], tasks: Sequence[Task], mesh: Mesh
                   ) -> list[Trained | Exception]:
    """Trains every run as `loop.train` would, from where it is; what is begun together goes on alone, and back.

    A run that ends leaves, and the step is compiled again for those that stay: no more often than for as many runs
    alone. What does not fit on the device is trained in halves, one after the other.

    Returns what `train` would have returned or raised, run by run: one that fails leaves as one that ends does.
    Raises UserError for runs of different shape and for what only a run alone can do.
    """
    for run, cfg, task in zip(runs, cfgs, tasks, strict=True):
        _check(cfg)
        if told := _unlike(cfgs[0], tasks[0], cfg, task):
            raise UserError(f"{runs[0].dir} and {run.dir} differ in {told}, and only runs of equal shape are trained "
                            "together; leave together=1")
    return _in_lockstep([Loop(*one, mesh) for one in zip(runs, cfgs, tasks, strict=True)])


def _check(cfg: LoopConfig) -> None:
    for key, value in ALONE.items():
        if getattr(cfg, key) != value:
            raise UserError(f"loop.{key}={getattr(cfg, key)} is for runs that are trained alone; leave it at "
                            f"{str(value).lower()}, or together=1")
    if jax.process_count() > 1:
        raise UserError(f"runs are trained together by one process, there are {jax.process_count()}; leave together=1")


def _unlike(cfg: LoopConfig, task: Task, other_cfg: LoopConfig, other: Task) -> str:
    """In what two runs differ that would share a step; empty if in nothing. (An optimizer is made of functions, which
    compare as different: its state is compared.)"""
    pairs = {"their loop.* keys": (cfg, other_cfg), "the model": (task.blueprint.graphdef, other.blueprint.graphdef),
             "the shapes of their states": (task.blueprint.abstract, other.blueprint.abstract),
             "what they are trained for": (task.step.objective, other.step.objective),
             "the shapes of their batches": (dict(task.example), dict(other.example))}
    return next((told for told, (one, two) in pairs.items() if one != two), "")


class _Member:
    """One of the runs. batch: what its next step reads; end: what it ended with, None before."""

    def __init__(self, loop: Loop):
        self.loop, self.steps = loop, loop.steps()
        self.batch: Any = None
        self.end: Trained | Exception | None = None

    def begin(self) -> None:
        def first() -> Any:
            state = self.loop.restore()
            self.loop.single = lambda: state
            return next(self.steps)

        self._to_next_step(first)

    def go_on(self, metrics: Any) -> None:
        self._to_next_step(lambda: self.steps.send(metrics))

    def interrupt(self) -> None:
        self._to_next_step(lambda: self.steps.throw(Stopped()))

    def _to_next_step(self, act: Callable[[], Any]) -> None:
        try:
            self.batch = act()
        except StopIteration as end:
            self.end = end.value
        except Exception as error:
            self.end = error


def _in_lockstep(loops: list[Loop]) -> list[Trained | Exception]:
    compiled = _compile(loops)
    if len(loops) > 1 and not _fits(compiled, loops[0].mesh):
        half = -(-len(loops) // 2)
        return _in_lockstep(loops[:half]) + _in_lockstep(loops[half:])
    members = [_Member(loop) for loop in loops]
    with contextlib.ExitStack() as opened:
        for member in members:
            opened.callback(member.steps.close)
            member.begin()
        total, done = sum(loop.cfg.steps for loop in loops), sum(loop.step for loop in loops)
        advance = opened.enter_context(loops[0].run.progress(total, f"training {len(loops)} runs", done))
        live = [member for member in members if member.end is None]
        group = Stacked(loops[0].task.blueprint, [member.loop.single() for member in live]) if live else None
        while live:
            if len(live) < len(loops):
                loops = [member.loop for member in live]
                compiled = _compile(loops)
            for place, loop in enumerate(loops):
                loop.single, loop.together, loop.clock = functools.partial(group.one, place), len(loops), None
            flying: collections.deque[Any] = collections.deque()
            while not stop.requested and all(member.end is None for member in live):
                with contextlib.ExitStack() as clocks:
                    for loop in loops:
                        clocks.enter_context(loop.stepping())
                    group.states, metrics = compiled(group.states, [member.batch for member in live])
                    flying.append(metrics)
                    if len(flying) > AHEAD:  # waits here, where it is everybody's time, and not in the first loop
                        jax.block_until_ready(flying.popleft())
                advance(len(live), loops[0].note)
                for member, found in zip(live, metrics, strict=True):  # all, also after a signal: the step is taken
                    member.go_on(found)
                    if member.loop.clock is None:  # it evaluated or saved, which is no part of the others' steps
                        for loop in loops:
                            loop.clock = None
            staying = [place for place, member in enumerate(live) if member.end is None]
            if stop.requested:  # nothing is stacked or compiled for those that wait for their next step
                for place in staying:
                    live[place].interrupt()
                break
            live = [live[place] for place in staying]
            if live:
                group.keep(staying)
    return [member.end for member in members]


def _compile(loops: Sequence[Loop]) -> Any:
    """The step of so many runs."""
    task, mesh, runs = loops[0].task, loops[0].mesh, len(loops)
    with contextlib.ExitStack() as clocks:
        for loop in loops:
            clocks.enter_context(loop.goodput.spend("compile"))
        step = make_step_together(task.step, task.blueprint, mesh, runs)
        batch = abstract_batch(task.example, mesh, loops[0].cfg.accumulate)
        compiled = step.lower(stacked_abstract(task.blueprint, runs), [batch] * runs).compile()
    tell_memory(compiled, f"a step of {runs} runs")
    return compiled


def _fits(compiled: Any, mesh: Mesh) -> bool:
    """Whether the memory of a step is free; where that is not known (CPU), yes."""
    stats, memory = mesh.devices.flat[0].memory_stats() or {}, compiled.memory_analysis()
    if memory is None or "bytes_limit" not in stats:
        return True
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return needed <= ROOM * (stats["bytes_limit"] - stats.get("bytes_in_use", 0))
