"""A signal at a chosen step of a run that is called in this process."""

import contextlib
from collections.abc import Iterator

import pytest

from train.runtime.run_folder import RunFolder
from train.runtime.signals import stop


@contextlib.contextmanager
def signal_at(last: int | None) -> Iterator[pytest.MonkeyPatch]:
    """While it is open, SIGTERM reaches a run once it has logged step `last`; None: never."""
    log = RunFolder.log

    def signal(self, step, **metrics):
        log(self, step, **metrics)
        if step == last:
            stop.requested = "SIGTERM"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "log", signal)
        patch.setattr(stop, "requested", None)
        yield patch
