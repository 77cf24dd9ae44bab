"""Where the wall time of a run goes, over all of its starts (training_runtime.md section 7).

Every second belongs to exactly one kind, so that the fractions add to one; `other` is what no kind names (logging, the
report). `lost` are steps that were taken before, by a start that ended before it saved them.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.runtime import files

WRITTEN = 10.0  # seconds of a run of steps, after which they are on disk: a start that is killed has no other occasion
KINDS = ("init", "compile", "restore", "data", "step", "save", "evaluation", "lost", "other")


class Goodput:
    """A stopwatch with one hand; kinds nest, the inner one counts."""

    def __init__(self, path: Path | None = None):
        """path: goodput.json of a run, which is carried on; None keeps nothing on disk."""
        before = (files.read_json(path) or {}) if path else {}
        self.path, self.seconds = path, {kind: float(before.get("seconds", {}).get(kind, 0.0)) for kind in KINDS}
        self.starts = int(before.get("starts", 0)) + 1
        self.furthest = int(before.get("furthest", 0))  # the last step that any start finished
        self._stack, self._since = ["other"], time.monotonic()
        self._written = self._since

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Seconds inside the block belong to `kind`."""
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is not one of {', '.join(KINDS)}")
        self._tick()
        self._stack.append(kind)
        try:
            yield
        finally:
            self._tick()
            self._stack.pop()

    def step(self, number: int) -> contextlib.AbstractContextManager[None]:
        """A training step: `lost` if an earlier start had finished it already."""
        return self.spend("lost" if number <= self.furthest else "step")

    def reached(self, number: int) -> None:
        """Step `number` is finished; that it is, and the time so far, is on disk soon."""
        self.furthest = max(self.furthest, number)
        if time.monotonic() - self._written > WRITTEN:
            self.write()

    def summary(self) -> dict[str, Any]:
        """seconds and fractions by kind, the number of starts."""
        self._tick()
        total = sum(self.seconds.values())
        return {
            "seconds": {kind: round(value, 3) for kind, value in self.seconds.items()},
            "total_seconds": round(total, 3),
            "fractions": {kind: value / total if total else 0.0 for kind, value in self.seconds.items()},
            "goodput": self.seconds["step"] / total if total else 0.0,
            "starts": self.starts,
            "furthest": self.furthest,
        }

    def write(self) -> None:
        self._written = time.monotonic()
        if self.path:
            files.write_json(self.path, self.summary())

    def _tick(self) -> None:
        now = time.monotonic()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now
