"""One folder of checkpoints on disk, and the only module that touches orbax.

What of orbax 0.12.8 would surprise its reader is said where it is handled.
"""

import contextlib
import gc
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp  # `import orbax.checkpoint.v1` fails

from jaxmodels.errors import UserError
from train.runtime import checkpoint_contents as contents
from train.runtime.checkpoint_contents import Damaged, reason

ITEM = "state"
COMMITTED = "commit_success.txt"  # written last, before the folder gets its name; on object stores the only sign
METADATA = "_CHECKPOINT_METADATA"
TEMPORARY = ".orbax-checkpoint-tmp"


class Folder:
    """One tier: a folder of steps, read fresh from the disk each time."""

    def __init__(self, path: Path, keep: int, keep_every: int | None):
        self.path = path.absolute()  # orbax refuses relative paths
        policies = ocp.training.preservation_policies
        self._keep = policies.AnyPreservationPolicy(
            [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])])
        self._manager: ocp.training.Checkpointer | None = None

    def all(self) -> list[int]:
        """Steps that have a folder, committed or not."""
        return sorted(int(name) for name in self._names() if name.isdecimal())

    def committed(self) -> list[int]:
        return [step for step in self.all() if (self.path / str(step) / COMMITTED).exists()]

    def ever(self) -> bool:
        """Whether any step was ever here. (Not orbax's temporary folders: a first save that was killed.)"""
        return any(re.fullmatch(r"\d+(\.(corrupt|abandoned).*)?", name) for name in self._names())

    def _names(self) -> list[str]:
        return [entry.name for entry in self.path.iterdir() if entry.is_dir()] if self.path.is_dir() else []

    def start(self, step: int, state: Any, record: dict[str, Any]) -> Any:
        """Begins an asynchronous save; returns what can be awaited."""
        if self._manager is None:  # not earlier: opening deletes temporary folders, a live run's too
            self._manager = ocp.training.Checkpointer(
                self.path, preservation_policy=self._keep, cleanup_tmp_directories=True, lightweight_initialize=True)
        self._manager.reload()  # its list of steps is kept in memory; steps renamed since would still count
        # force: the policy, continuous by default, skips saves, and so does any policy for steps before the newest.
        return self._manager.save_checkpointables_async(
            step, {ITEM: contents.pack(state)}, custom_metadata=record, force=True)

    def reset(self) -> None:
        """After a failed save: deletes what it left, and forgets the manager, whose list lacks steps still on disk."""
        manager, self._manager = self._manager, None
        with contextlib.suppress(Exception), quiet():  # it raises the failure once more
            if manager is not None:
                manager.close()
        if jax.process_index() == 0:
            for left in self.path.glob(f"*{TEMPORARY}*"):
                shutil.rmtree(left, ignore_errors=True)  # now and not at the next opening: its space may be all we need

    def set_aside(self, step: int, label: str) -> bool:
        """Renames a step to the first free of ``7.corrupt``, ``7.corrupt.2``...; False if the disk refuses."""
        source, target, count = self.path / str(step), self.path / f"{step}.{label}", 1
        while target.exists():
            count += 1
            target = self.path / f"{step}.{label}.{count}"
        try:
            source.rename(target)
        except OSError as error:
            say(f"checkpoint {source} cannot be renamed to {target.name}: {error.strerror}")
            return False
        say(f"checkpoint {source} is now {target.name}")
        return True

    def metadata(self, step: int) -> dict[str, Any]:
        """The record of a step. Raises Damaged, or UserError if it is too new or not ours to read.

        From its file: orbax answers {} for a damaged one, and opens every array on the way.
        """
        try:
            text = (self.path / str(step) / METADATA).read_text(encoding="utf-8")
        except PermissionError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise Damaged(f"its metadata is damaged ({reason(error)})") from error
        return contents.unseal(text)

    def read(self, step: int, abstract: Any, *, cast: bool) -> tuple[dict[str, Any], Any]:
        """(record, arrays as they were packed) of a step, by this process alone: no other one need be here.

        Raises Damaged, or UserError if the step is whole and of another model.
        """
        folder = self.path / str(step)
        if not (folder / COMMITTED).exists():
            raise Damaged("it has no commit marker, so its save never ended")
        record = self.metadata(step)
        contents.check_model(record["fingerprints"], abstract, str(folder), cast=cast)
        return record, self._arrays(folder, contents.target(record["fingerprints"], abstract))

    def _arrays(self, folder: Path, tree: Any) -> Any:
        """Loads. What a file's content can cause becomes Damaged; this machine's own troubles stay as they are."""
        only = jax.process_index()  # without barriers: if one process cannot read, the others would wait for it
        context = contextlib.nullcontext() if jax.process_count() == 1 else ocp.Context(
            multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=only, active_processes={only}))
        with quiet():
            try:
                with context:
                    return ocp.load_checkpointables(folder, {ITEM: tree})[ITEM]
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:
                if "PERMISSION_DENIED" in str(error):
                    raise UserError(f"cannot read {folder}: permission denied") from error
                why = f"it cannot be loaded ({reason(error)})"
            gc.collect()  # what the failure left behind dies here, in silence
        raise Damaged(why)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps stderr for our line: what fails in orbax leaves coroutines and threads, each dying with a page of text."""
    hooks = sys.unraisablehook, sys.excepthook
    sys.unraisablehook = sys.excepthook = lambda *_: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        sys.unraisablehook, sys.excepthook = hooks


def say(line: str) -> None:
    """One line on stderr, from process 0."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


# orbax logs each failure once per thread, some 500 lines; all of them reach us as exceptions, which we report.
for _logger in ("absl", "asyncio"):
    logging.getLogger(_logger).addFilter(lambda record: "orbax" not in record.pathname + record.getMessage())
