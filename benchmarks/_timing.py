"""Timing on a machine that is never quite quiet: the contestants take turns, and quantiles are reported."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

STAT = Path("/proc/stat")


@dataclasses.dataclass
class Samples:
    """seconds: wall-clock time of every repeat. elsewhere: share of the machine's cores, 0..1, that other processes
    (or, on a virtual machine, its host) took meanwhile; nan where the system does not tell."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    elsewhere: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def summary(self) -> dict[str, float]:
        low, middle, high = np.percentile(self.seconds, (10, 50, 90))
        return {"median_s": float(middle), "p10_s": float(low), "p90_s": float(high), "min_s": min(self.seconds),
                "repeats": len(self.seconds), "elsewhere": float(np.mean(self.elsewhere))}


def take_turns(functions: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, Samples]:
    """Runs every function ``warmup`` times, then ``repeats`` rounds of one call each; a function returns when its work
    is done (``jax.block_until_ready``). Each round starts with another function, so that none always follows the same
    neighbour's caches and idle threads."""
    names = list(functions)
    for name in names:
        for _ in range(warmup):
            functions[name]()
    samples = {name: Samples() for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            busy, own, start = _busy(), _own(), time.perf_counter()
            functions[name]()
            wall = time.perf_counter() - start
            foreign = (_busy() - busy) - (_own() - own)
            samples[name].seconds.append(wall)
            samples[name].elsewhere.append(max(0.0, foreign) / wall / (os.cpu_count() or 1))
    return samples


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _own() -> float:
    times = os.times()
    return times.user + times.system


def _busy() -> float:
    """Core-seconds that the machine worked since it started, for anybody: all of /proc/stat but idle and iowait."""
    if not STAT.exists():
        return float("nan")
    user, nice, system, _, _, *rest = map(int, STAT.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
