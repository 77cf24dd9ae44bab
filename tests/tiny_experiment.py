"""Adds numbers slowly: an experiment for the tests of the house.

Not in configs/: the command finds it by its module path, ``jaxmodels run tests.tiny_experiment``.
"""

import dataclasses
import os
import signal
import time
from typing import Literal

from jaxmodels.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 4  # numbers added in a unit
    rate: float = 0.5
    kind: Literal["sum", "mean"] = "sum"


@dataclasses.dataclass(frozen=True)
class Config:
    units: int = 3  # units of work
    languages: tuple[str, ...] = ("de", "fr")
    limit: int | None = None
    shout: bool = False
    note: str = "plain"
    pause: float = 0.0  # seconds in each unit
    inner: Inner = Inner()
    seed: int = 0
    entry: str = "tests.tiny_experiment:run"
    together: str = "tests.tiny_experiment:run_together"
    report: str = "tests.tiny_experiment:report"

    def __post_init__(self):
        if self.units < 1:
            raise ValueError(f"units {self.units} is below 1; set units to 1 or more")


PRESETS = {"tiny": {"units": 2, "inner.size": 2}}
NEEDS = ("gettext", "smollm2-135m-instruct")
MINUTES = {"tiny": 0.01}
GRIDS = {"sizes": {"small": {"inner.size": 2}, "large": {"inner.size": 5}}}


def get_config() -> Config:
    return Config()


def run(config, folder):
    if config.note == "bad input":
        raise UserError("note 'bad input' is not accepted; choose another")
    if config.note == "bug":
        raise ZeroDivisionError("a bug")
    if config.note == "odd bug" and config.seed % 2:
        raise ZeroDivisionError("an odd bug")
    computed = 0
    with folder.progress(config.units, "units") as advance:
        for unit in range(config.units):
            if folder.load_npz(f"units/{unit}") is None:
                time.sleep(config.pause)
                folder.save_npz(f"units/{unit}", total=sum(range(unit, unit + config.inner.size)))
                computed += 1
            if unit == 1 and (config.note == "kill always" or config.note == "kill" and not folder.resumed):
                os.kill(os.getpid(), signal.SIGKILL)
            print(f"unit {unit}", flush=True)
            advance()
            folder.check_stop()
    totals = [int(folder.load_npz(f"units/{unit}")["total"]) for unit in range(config.units)]
    folder.write_results({"total": sum(totals) + config.seed, "computed": computed})


def run_together(configs, folders):
    """One after another, and every folder tells how many there were."""
    ends = []
    for config, folder in zip(configs, folders, strict=True):
        folder.write_results({"together": len(configs)})
        try:
            run(config, folder)
            ends.append(None)
        except Exception as error:
            ends.append(error)
    return ends


def report(directory):
    (directory / "report.html").write_text("<!doctype html><title>tiny</title>")
