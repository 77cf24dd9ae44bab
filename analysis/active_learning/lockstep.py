"""The training of one round, of one learner or of several at once: then a step under vmap takes the steps of all.

Learners of a study have the same shapes and as many steps a round. Where an interruption has left one behind, it
catches up first: those with most steps left go on until others have as many left.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import Interrupted, UserError
from train.runtime.step import TrainStep

SAVE_SECONDS = 60.0
BAD_STEPS = 10  # non-finite steps in a row

Batch = dict[str, np.ndarray]


class Training(NamedTuple):
    """A state, and where in its training it is: `done` steps of `round`, which took `seconds`."""

    state: dict[str, Any]
    round: int
    done: int
    seconds: float


@dataclasses.dataclass
class Round:
    """What is left of a learner's round: `steps` in all, the batch of each by its number, how to save, and what raises
    Interrupted when it is time to stop."""

    training: Training
    steps: int
    batch: Callable[[int], Batch]
    save: Callable[[Training], None]
    check: Callable[[], None]

    @property
    def left(self) -> int:
        return max(self.steps - self.training.done, 0)


class Steps:
    """A `TrainStep`, compiled for one learner and, where it is asked for, for several. learning_rate: to tell of."""

    def __init__(self, step: TrainStep, learning_rate: float):
        self.learning_rate = learning_rate
        self.one = jax.jit(step, donate_argnums=0)
        self.several = jax.jit(jax.vmap(step), donate_argnums=0)  # compiled for each number of learners

    def train(self, rounds: Sequence[Round], advance: Callable[..., None]) -> None:
        """All rounds to their end; each is saved there, every SAVE_SECONDS, and before Interrupted goes up.

        Raises UserError when BAD_STEPS in a row were not finite.
        """
        while live := [one for one in rounds if one.left]:
            most = max(one.left for one in live)
            behind = max((one.left for one in live if one.left < most), default=0)
            self._go([one for one in live if one.left == most], most - behind, advance)

    def _go(self, group: Sequence[Round], count: int, advance: Callable[..., None]) -> None:
        """So many steps of rounds that have as many left. A step's time is shared by those who took it."""
        alone, starts = len(group) == 1, [one.training for one in group]
        states = starts[0].state if alone else jax.tree.map(lambda *leaves: jnp.stack(leaves),
                                                            *[start.state for start in starts])

        def save(taken: int, seconds: float) -> None:
            for place, (one, start) in enumerate(zip(group, starts, strict=True)):
                state = states if alone else jax.tree.map(lambda leaf, place=place: leaf[place], states)
                one.training = Training(state, start.round, start.done + taken, start.seconds + seconds / len(group))
                one.save(one.training)

        saved = began = time.perf_counter()
        for taken in range(count):
            batches = [one.batch(start.done + taken) for one, start in zip(group, starts, strict=True)]
            if alone:
                states, metrics = self.one(states, batches[0])
            else:
                states, metrics = self.several(states, jax.tree.map(lambda *parts: np.stack(parts), *batches))
            if np.max(metrics["bad"]) >= BAD_STEPS:
                raise UserError(f"{BAD_STEPS} steps in a row had a loss or gradient that is not finite; lower "
                                f"optimizer.learning_rate={self.learning_rate}")
            advance(len(group))
            now = time.perf_counter()
            try:
                for one in group:
                    one.check()
            except Interrupted:
                save(taken + 1, now - began)
                raise
            if now - saved > SAVE_SECONDS:
                save(taken + 1, now - began)
                saved = now
        save(count, time.perf_counter() - began)
