"""Many runs of one experiment in one folder: the variants of a grid, each with several seeds; resumed as one run is.

    jaxmodels sweep lm_moe_pretrain grid=twins seeds=3               # a grid that the experiment names (GRIDS)
    jaxmodels sweep lm_moe_pretrain "grid=model.top_k=1,2;optimizer.name=adamw,muon" preset=tiny
    jaxmodels sweep text2tree_mesh grid=methods seeds=4 together=4       # seeds of a variant, one step for all
    jaxmodels sweep text2tree_mesh grid=methods seeds=4 workers=4        # four trials at once, in four processes

Every trial has a run folder of its own inside the sweep's, so whatever reads runs reads trials. Seeds are the outer
loop: what a shared machine does to the clock falls on all variants alike, and an early stop leaves whole comparisons.

Where an experiment's config has ``share_grids``, a folder takes several grids of it, one after another: variants of
equal names are the same trials, and the report is over all that is there.

together=N trains up to N seeds of a variant in lockstep (`train.runtime.together`), where an experiment's config names
a function for that: ``together="module:function"``, called as ``function(configs, run folders)``, gives what each trial
failed with, or None. workers=N runs up to N of these groups at once, in processes of their own
(`train.sweep_workers`). Both are for a device that one trial does not fill, and change nothing of what is computed.
"""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.errors import Interrupted, UserError
from train import sweep_workers
from train.runtime import distributed
from train.runtime.config import defaults_of, did_you_mean, find, load_function, resolve, split_override, to_dict
from train.runtime.run_folder import CONFIG, RunFolder, is_complete

SEED = "seed"  # the key of an experiment's config that seeds change
TOGETHER = "together"
REPORT = "analysis.sweep_report:build"  # where an experiment's config names none of its own, `sweep_report`


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    variant: str
    seed: int | None  # None: the experiment has no seed
    config: Any

    @property
    def folder(self) -> str:
        return self.variant if self.seed is None else f"{self.variant}/seed-{self.seed}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep runs, group by group. `config` is what its folder records; more seeds may be asked for later, and
    whatever else is `operational`."""

    name: str
    config: dict[str, Any]
    groups: tuple[tuple[Trial, ...], ...]  # of trials that are trained together
    asked: tuple[str, ...]  # what `plan` made it of
    workers: int = 1  # processes that run the groups; 1: this one does
    operational: tuple[str, ...] = ("seeds", "together", "workers")

    @property
    def trials(self) -> tuple[Trial, ...]:
        return sum(self.groups, ())


def plan(name: str, words: Iterable[str]) -> Sweep:
    """The trials of ``["grid=...", "seeds=3", "key=value", ...]``. Raises UserError before anything runs."""
    words = tuple(words)
    given = dict(map(split_override, words))
    grid = given.pop("grid", "")
    count, together, workers = (_at_least_one(key, given.pop(key, "1")) for key in ("seeds", "together", "workers"))
    if not grid:
        grids = find(name).grids
        raise UserError(f"nothing to vary: give grid=NAME ({', '.join(grids) or name + ' names none'}) or "
                        "grid=key=value,value")
    variants = _variants(name, grid)
    _check_grid(grid, variants, given)
    probe = resolve(name, {**given, **next(iter(variants.values()))})
    seeds: Sequence[int | None] = (None,)
    if hasattr(probe, SEED):
        seeds = range(probe.seed, probe.seed + count)
    elif count > 1:
        raise UserError(f"seeds={count}: {name} has no key {SEED!r}, so all seeds would give the same; leave it out")
    if together > 1 and not hasattr(probe, TOGETHER):
        raise UserError(f"together={together}: {name} trains its trials one by one only (its config names no "
                        f"{TOGETHER!r}); leave it out")
    if workers > 1 and distributed.plan() is not None:
        raise UserError(f"workers={workers} are processes of one machine, and this is one of several that compute "
                        "together (docs/launch.md); leave it out")
    groups = []
    some = [seeds[start:start + together] for start in range(0, len(seeds), together)]
    for few, (variant, changes) in itertools.product(some, variants.items()):
        seeded = [{} if seed is None else {SEED: str(seed)} for seed in few]
        groups.append(tuple(Trial(variant, seed, resolve(name, {**given, **changes, **one}))
                            for seed, one in zip(few, seeded, strict=True)))
    config = {"experiment": find(name).name, "grid": grid, "overrides": given, "seeds": count, "together": together,
              "workers": workers, "report": getattr(probe, "sweep_report", REPORT)}
    shared = ("grid",) if getattr(probe, "share_grids", False) else ()
    return Sweep(f"{find(name).name}-sweep", config, tuple(groups), (name, *words), workers,
                 (*Sweep.operational, *shared))


def _at_least_one(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{key}={text} must be a whole number of at least 1")
    return int(text)


def run(sweep: Sweep, folder: RunFolder, build_report: Callable[[Path, str], Any]) -> Exception | None:
    """Runs every trial that is not complete, and goes on after one that fails; returns the first failure, told in full.

    build_report(directory, function) makes a trial's own report.
    """
    failures: list[tuple[Trial, Exception]] = []

    def failed(trial: Trial, error: Exception) -> None:
        failures.append((trial, error))
        print(f"{trial.folder} failed: {error}", file=sys.stderr)

    grids = [grid for grid in folder.results().get("grids", []) if grid != sweep.config["grid"]]
    order = _order(sweep, folder)
    folder.write_results({"grids": [*grids, sweep.config["grid"]], "trials": len(order), "order": order})
    others: dict[int, tuple[Trial, ...]] = {}  # for workers; that a trial is complete is seen without
    with folder.progress(len(sweep.trials), "trials") as advance:
        for number, group in enumerate(sweep.groups):
            if sweep.workers > 1 and not all(is_complete(folder.dir / trial.folder) for trial in group):
                others[number] = group
                continue
            run_group(group, folder, build_report, failed)
            advance(len(group), group[-1].folder)

        def ended(number: int, errors: sweep_workers.Failures) -> None:
            for trial in others[number]:
                if trial.folder in errors:
                    failed(trial, errors[trial.folder])
            advance(len(others[number]), others[number][-1].folder)

        if others:
            names = {number: [trial.folder for trial in group] for number, group in others.items()}
            sweep_workers.run_groups(names, sweep.workers, sweep.asked, folder, ended)
            folder.check_stop()
    folder.write_results({"failed_trials": len(failures)})
    if not failures:
        return None
    trial, error = failures[0]
    told = f"{len(failures)} of {len(sweep.trials)} trials failed, {trial.folder} first: {error}"
    return sweep_workers.failure(told, sweep_workers.exit_code_of(error))


def _order(sweep: Sweep, folder: RunFolder) -> list[str]:
    """Folders of all trials, as one process would begin them after another: workers may begin the second before the
    first, and a report compares with the first."""
    there = sorted((path for place in ("*", "*/seed-*") for path in folder.dir.glob(f"{place}/{CONFIG}")),
                   key=lambda path: path.stat().st_mtime)
    known = [*(str(path.parent.relative_to(folder.dir)) for path in there), *(trial.folder for trial in sweep.trials)]
    before = {name: place for place, name in enumerate(folder.results().get("order", []))}
    return sorted(dict.fromkeys(known), key=lambda name: before.get(name, len(before)))


def run_group(trials: Sequence[Trial], folder: RunFolder, build_report: Callable[[Path, str], Any],
              failed: Callable[[Trial, Exception], None]) -> None:
    """Runs those that are not complete. Raises Interrupted when all their folders are closed."""
    opened = []  # trial, its folder, and what closes it
    for trial in trials:
        operational, defaults = getattr(trial.config, "operational", ()), defaults_of(trial.config)
        closing = contextlib.ExitStack()
        try:
            stage = closing.enter_context(folder.stage(trial.folder, to_dict(trial.config), operational, defaults))
        except Exception as error:
            failed(trial, error)
            continue
        if stage.was_complete:
            closing.close()
            if stage.writes and not (stage.dir / "report.html").exists():  # it failed, or was interrupted
                _report(trial, stage, build_report, failed)
        else:
            opened.append((trial, stage, closing))
    ends = _train([trial.config for trial, *_ in opened], [stage for _, stage, _ in opened])
    interrupted = None
    for (trial, stage, closing), end in zip(opened, ends, strict=True):
        try:
            with closing:
                if end is not None:
                    raise end
            if stage.writes:
                _report(trial, stage, build_report, failed)
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, Interrupted):
                failed(trial, error)
            else:
                interrupted = error
    if interrupted is not None:
        raise interrupted
    folder.check_stop()


def _report(trial: Trial, stage: RunFolder, build_report: Callable[[Path, str], Any],
            failed: Callable[[Trial, Exception], None]) -> None:
    try:
        build_report(stage.dir, trial.config.report)
    except Exception as error:
        failed(trial, error)


def _train(configs: Sequence[Any], stages: Sequence[RunFolder]) -> Sequence[BaseException | None]:
    """What each run ended with, None for those that came to their end."""
    try:
        if len(configs) > 1:
            return load_function(getattr(configs[0], TOGETHER))(configs, stages)
        for config, stage in zip(configs, stages, strict=True):
            load_function(config.entry)(config, stage)
        return [None] * len(configs)
    except BaseException as error:  # a second Ctrl-C too: the folders must be told
        return [error] * len(configs)


def _variants(name: str, grid: str) -> dict[str, dict[str, Any]]:
    """variant -> what it changes."""
    if "=" not in grid:
        grids = find(name).grids
        if grid not in grids:
            raise UserError(f"unknown grid {grid!r} of {name}; {did_you_mean(grid, grids)}, or write one: "
                            "grid=key=value,value")
        return {variant: dict(changes) for variant, changes in grids[grid].items()}
    axes = []
    for text in grid.split(";"):
        key, equals, values = text.partition("=")
        if not equals or not key.strip() or not all(values.split(",")):
            raise UserError(f"grid={grid}: {text!r} is not key=value,value")
        axes.append([(key.strip(), value) for value in values.split(",")])
        if any(axis[0][0] == key.strip() for axis in axes[:-1]):
            raise UserError(f"grid={grid}: {key.strip()} is there twice; write all of its values together")
    found: dict[str, dict[str, Any]] = {}
    for chosen in itertools.product(*axes):
        variant = ",".join(f"{key}={value}" for key, value in chosen).replace("/", "_")
        if variant in found:
            raise UserError(f"grid={grid}: two variants are called {variant}, the name of their folder; leave one out")
        found[variant] = dict(chosen)
    return found


def _check_grid(grid: str, variants: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]) -> None:
    """Raises UserError for what no trial would read: seeds in a grid, and a key whose values the grid gives."""
    if any(SEED in changes for changes in variants.values()):
        raise UserError(f"grid={grid}: seeds are no variants; seeds=N gives every variant N of them, the first "
                        f"{SEED}=...")
    for key, value in given.items():
        if all(key in changes for changes in variants.values()) and any(
                str(changes[key]) != value for changes in variants.values()):
            raise UserError(f"{key}={value} and grid={grid}: the grid gives every variant its own {key}; leave one out")
