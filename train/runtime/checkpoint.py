"""Checkpoints: written beside the run, verified when loaded, never silently wrong (training_runtime.md section 5).

A step is a folder ``<step>``; what is damaged becomes ``<step>.corrupt`` and what a run left behind by going back
becomes ``<step>.abandoned``; neither is deleted. Orbax is behind checkpoint_folder.py.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmodels.errors import UserError
from train.runtime import checkpoint_contents as contents
from train.runtime.checkpoint_contents import Damaged, reason
from train.runtime.checkpoint_folder import Folder, quiet, say
from train.runtime.environment import git_commit, versions
from train.runtime.files import CannotSave
from train.runtime.fingerprint import fingerprints, layout

_NEVER, _EXHAUSTED = -2, -1  # what `restore` may find instead of a candidate


class NoValidCheckpoint(UserError):
    """There were checkpoints and none can be trusted; starting from scratch is the user's decision. Exit code 66."""

    exit_code = 66


class Restored(NamedTuple):
    """What `Checkpoints.restore` returns; metadata is of the current schema."""

    step: int
    state: Any
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run; `failures` counts saves that failed. All methods are collective over processes.

    every: steps between durable saves; keep: how many of the newest stay (2 or more, so that a good one survives a
    save that fails); keep_every: steps divisible by it stay for ever. local, local_every: a second folder for more
    frequent saves, the last two kept, seen by all processes. verify: "on_restart" stores fingerprints and compares
    them on loading, "always" also reads every step back after writing it (a second copy in device memory), "never"
    does neither. Writes nothing before the first save. Raises UserError for settings that cannot hold.
    """

    def __init__(self, directory: str | Path, *, every: int, keep: int = 3, keep_every: int | None = None,
                 local: str | Path | None = None, local_every: int | None = None,
                 verify: Literal["always", "on_restart", "never"] = "on_restart", max_failures: int = 2):
        if keep < 2:
            raise UserError(f"keep={keep} checkpoints leave none while one is replaced; set keep to 2 or more")
        if every < 1 or (keep_every is not None and keep_every < 1) or (local_every is not None and local_every < 1):
            raise UserError(f"every={every}, keep_every={keep_every}, local_every={local_every}: at least 1 step each")
        if (local is None) != (local_every is None):
            raise UserError(f"local={local} and local_every={local_every} go together; give both or neither")
        if verify not in ("always", "on_restart", "never"):
            raise UserError(f"verify={verify!r} must be always, on_restart or never")
        self.every, self.local_every, self.verify, self.max_failures = every, local_every, verify, max_failures
        self.failures = 0
        self._durable = Folder(Path(directory), keep, keep_every)
        self._folders = [self._durable] if local is None else [self._durable, Folder(Path(local), 2, None)]
        self._pending: tuple[Folder, int, Any, Any] | None = None  # folder, step, orbax's response, abstract state
        self._in_a_row = 0
        self._about: dict[str, Any] = {}

    def due(self, step: int) -> bool:
        """Whether a loop that finished `step` should save now."""
        return step > 0 and (step % self.every == 0 or (self.local_every is not None and step % self.local_every == 0))

    def save(self, step: int, state: Any, metadata: dict[str, Any], wait: bool = False) -> None:
        """Starts to save `state` (a tree of jax arrays), which may be donated as soon as this returns.

        The previous save is awaited first. `metadata` becomes JSON beside versions, git commit and fingerprints.
        A step that is already there with the same content is left alone. With wait=True the step is durable on return,
        or CannotSave is raised; else a failed save shows in `failures` and at the next call, and CannotSave (exit 74)
        is raised once `max_failures` failed in a row.
        """
        self.wait()
        record = self._record(state, metadata)
        folder = self._durable if wait or step % self.every == 0 or not self.due(step) else self._folders[-1]
        if _lead(lambda: self._make_room(folder, step, record["fingerprints"])):
            try:
                self._pending = (folder, step, folder.start(step, state, record), contents.abstract_of(state))
            except (TypeError, AttributeError):
                raise  # a mistake in a program, not a full disk
            except Exception as error:  # the disk may refuse before anything runs in the background
                # Other processes wait inside orbax for this one: only its end lets them go.
                self._failed(folder, step, error, final=wait or jax.process_count() > 1)
        if wait:
            self._settle(final=True)

    def wait(self) -> None:
        """Until the save under way is on disk. Raises CannotSave as `save` does."""
        self._settle(final=False)

    def _settle(self, *, final: bool) -> None:
        if self._pending is None:
            return
        (folder, step, response, abstract), self._pending = self._pending, None
        error: Exception | None = None
        try:
            with quiet():
                response.result()  # background errors appear here: OSError, tensorstore's ValueError, bare Exception
        except Exception as raised:
            error = raised
        failed = _anywhere(error is not None)
        if not failed and self.verify == "always":
            try:
                self._load(folder, step, abstract)
            except Damaged as damage:
                error, failed = damage, True
                _lead(lambda: folder.set_aside(step, "corrupt"))
        if failed:
            self._failed(folder, step, error or RuntimeError("another process failed"), final=final)
        else:
            self._in_a_row = 0

    def restore(self, abstract_state: Any, *, step: int | None = None, cast: bool = False) -> Restored | None:
        """The newest step (or just `step`) that is whole, placed as `abstract_state` says; None if there never was one.

        abstract_state: the state's tree with jax.ShapeDtypeStruct leaves that carry shape, dtype and sharding.
        Damaged steps are passed over, each with a line on stderr, and renamed once a whole one is found: if none is,
        the fault may lie with this machine, and everything stays as it is for another try. Raises NoValidCheckpoint
        (exit 66) then, and UserError (exit 2) if a healthy checkpoint is of another model or, without cast=True, has
        other dtypes.
        """
        self.wait()
        bad: set[tuple[int, int]] = set()
        while (found := _lead(lambda: self._candidate(step, bad))) >= 0:
            number, which = divmod(found, 2)
            folder = self._folders[which]
            try:
                restored = self._load(folder, number, abstract_state, cast=cast)
            except Damaged as damage:
                say(f"checkpoint {folder.path / str(number)} is passed over: {damage}")
                bad.add((number, which))
                continue
            for number, which in sorted(bad):
                _lead(lambda: self._folders[which].set_aside(number, "corrupt"))
            return restored
        where = " and ".join(str(folder.path) for folder in self._folders)
        if found == _NEVER and step is None:
            return None
        if step is not None and not bad:
            steps = sorted({number for folder in self._folders for number in folder.committed()})
            raise UserError(f"no checkpoint of step {step} in {where}; there are {steps or 'none'}")
        raise NoValidCheckpoint(f"no checkpoint in {where} can be loaded; repair what is said above or in *.corrupt, "
                                "or choose another --out to start from scratch")

    def _load(self, folder: Folder, step: int, abstract: Any, *, cast: bool = False) -> Restored:
        """A step, checked. Raises Damaged in every process or in none, or UserError if it is of another model.

        Fingerprints are sums over all processes: who could not read must say so first, or the others wait for ever.
        """
        try:
            read, why = folder.read(step, abstract, cast=cast), ""
        except Damaged as damage:
            read, why = None, str(damage)
        if _anywhere(read is None):
            raise Damaged(why or "another process cannot read it")
        record, arrays = read
        stored = record["fingerprints"]
        state = contents.unpack(arrays, stored, abstract)
        if self.verify != "never" and all(" " in text for text in stored.values()):  # else saved with verify="never"
            found = fingerprints(state)
            if wrong := next((path for path in stored if stored[path] != found[path]), None):
                raise Damaged(f"{wrong} has fingerprint {found[wrong]}, and had {stored[wrong]} when it was saved")
        return Restored(step, contents.cast_to(state, abstract), record)

    def _candidate(self, only: int | None, bad: set[tuple[int, int]]) -> int:
        """2 * step + folder of the newest step not known as bad, the local one first; else _EXHAUSTED or _NEVER."""
        steps = [(step, i) for i, folder in enumerate(self._folders) for step in folder.all()]
        left = [(step, i) for step, i in steps if (step, i) not in bad and only in (None, step)]
        if left:
            return 2 * max(left)[0] + max(left)[1]
        # Renamed folders count: a second start must not take a run whose checkpoints were all damaged for a new one.
        return _EXHAUSTED if any(folder.ever() for folder in self._folders) else _NEVER

    def _make_room(self, folder: Folder, step: int, prints: dict[str, str]) -> bool:
        """Sets aside what the run left behind by going back to an earlier step; False if `step` is there already.

        Otherwise the next restart would take the old branch's step, the newer one, for this run's.
        """
        room = True
        for other in self._folders:
            for number in other.all():
                if number == step and other is folder and self._holds(folder, step, prints):
                    room = False
                elif number > step or (number == step and other is folder):
                    say(f"checkpoint {other.path / str(number)} is of another branch: step {step} is saved now")
                    other.set_aside(number, "abandoned")
        return room

    def _holds(self, folder: Folder, step: int, prints: dict[str, str]) -> bool:
        if self.verify == "never" or step not in folder.committed():
            return False
        with contextlib.suppress(Damaged, UserError):
            return folder.metadata(step)["fingerprints"] == prints
        return False

    def _record(self, state: Any, metadata: dict[str, Any]) -> dict[str, Any]:
        self._about = self._about or {"versions": versions(), "git": git_commit()}
        prints = layout(state) if self.verify == "never" else fingerprints(state)
        return contents.seal({**self._about, **metadata, "fingerprints": prints})

    def _failed(self, folder: Folder, step: int, error: Exception, *, final: bool) -> None:
        self.failures, self._in_a_row = self.failures + 1, self._in_a_row + 1
        folder.reset()
        why = reason(error)
        say(f"checkpoint {step} could not be saved in {folder.path}: {why}")
        if final or self._in_a_row >= self.max_failures:
            raise CannotSave(f"cannot save step {step} in {folder.path} ({self._in_a_row} in a row): {why}; free space "
                             "or choose --out, then start again") from error


def _lead(decide: Callable[[], int]) -> int:
    """Process 0's answer, in every process; no process goes on before it is given."""
    if jax.process_count() == 1:
        return int(decide())
    return int(multihost_utils.broadcast_one_to_all(np.int32(decide() if jax.process_index() == 0 else 0)))


def _anywhere(trouble: bool) -> bool:
    """Whether any process has it."""
    return trouble if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.bool_(trouble))))
