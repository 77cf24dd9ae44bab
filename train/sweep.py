"""Many runs of one experiment in one folder: the variants of a grid, each with several seeds; resumed as one run is.

    jaxmodels sweep lm_moe_pretrain grid=twins seeds=3               # a grid that the experiment names (GRIDS)
    jaxmodels sweep lm_moe_pretrain "grid=model.top_k=1,2;optimizer.name=adamw,muon" preset=tiny

Every trial has a run folder of its own inside the sweep's, so whatever reads runs reads trials. Seeds are the outer
loop: what a shared machine does to the clock falls on all variants alike, and an early stop leaves whole comparisons.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.errors import Interrupted, UserError
from train.runtime.config import defaults_of, did_you_mean, find, load_function, resolve, split_override, to_dict
from train.runtime.run_folder import RunFolder

SEED = "seed"  # the key of an experiment's config that seeds change
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
    """What a sweep runs. `config` is what its folder records; more seeds may be asked for later."""

    name: str
    config: dict[str, Any]
    trials: tuple[Trial, ...]
    operational = ("seeds",)


def plan(name: str, words: Iterable[str]) -> Sweep:
    """The trials of ``["grid=...", "seeds=3", "key=value", ...]``. Raises UserError before anything runs."""
    given = dict(map(split_override, words))
    grid, count = given.pop("grid", ""), given.pop("seeds", "1")
    if not grid:
        grids = find(name).grids
        raise UserError(f"nothing to vary: give grid=NAME ({', '.join(grids) or name + ' names none'}) or "
                        "grid=key=value,value")
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"seeds={count} must be a whole number of at least 1")
    variants = _variants(name, grid)
    probe = resolve(name, {**given, **next(iter(variants.values()))})
    seeds: Sequence[int | None] = (None,)
    if hasattr(probe, SEED):
        seeds = range(probe.seed, probe.seed + int(count))
    elif int(count) > 1:
        raise UserError(f"seeds={count}: {name} has no key {SEED!r}, so all seeds would give the same; leave it out")
    trials = []
    for seed, (variant, changes) in itertools.product(seeds, variants.items()):
        seeded = {} if seed is None else {SEED: str(seed)}
        trials.append(Trial(variant, seed, resolve(name, {**given, **changes, **seeded})))
    config = {"experiment": find(name).name, "grid": grid, "overrides": given, "seeds": int(count),
              "report": getattr(probe, "sweep_report", REPORT)}
    return Sweep(f"{find(name).name}-sweep", config, tuple(trials))


def run(sweep: Sweep, folder: RunFolder, build_report: Callable[[Path, str], Any]) -> Exception | None:
    """Runs every trial that is not complete, and goes on after one that fails; returns the first failure, told in full.

    build_report(directory, function) makes a trial's own report.
    """
    failures: list[tuple[Trial, Exception]] = []
    with folder.progress(len(sweep.trials), "trials") as advance:
        for trial in sweep.trials:
            try:
                _run_trial(trial, folder, build_report)
            except Interrupted:
                raise
            except Exception as error:
                failures.append((trial, error))
                print(f"{trial.folder} failed: {error}", file=sys.stderr)
            advance(1, trial.folder)
    folder.write_results({"trials": len(sweep.trials), "failed_trials": len(failures)})
    if not failures:
        return None
    trial, error = failures[0]
    told = f"{len(failures)} of {len(sweep.trials)} trials failed, {trial.folder} first: {error}"
    return type(error)(told) if isinstance(error, UserError) else RuntimeError(told)


def _run_trial(trial: Trial, folder: RunFolder, build_report: Callable[[Path, str], Any]) -> None:
    operational, defaults = getattr(trial.config, "operational", ()), defaults_of(trial.config)
    with folder.stage(trial.folder, to_dict(trial.config), operational, defaults) as stage:
        if stage.was_complete:
            return
        load_function(trial.config.entry)(trial.config, stage)
    if stage.writes:
        build_report(stage.dir, trial.config.report)
    folder.check_stop()


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
    return {",".join(f"{key}={value}" for key, value in chosen).replace("/", "_"): dict(chosen)
            for chosen in itertools.product(*axes)}
