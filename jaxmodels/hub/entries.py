"""How one parameter leaf of ours is made of tensors of a checkpoint, and back: the contract of every convert.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def same(value: np.ndarray) -> np.ndarray:
    """Stored as we hold it."""
    return value


def transpose(value: np.ndarray) -> np.ndarray:
    """[out, in] of a torch Linear <-> [in, out] of ours."""
    return value.T


@dataclass(frozen=True)
class Source:
    """One tensor of the checkpoint: its name, its shape there, and the way here and back (exact inverses)."""

    name: str
    hf_shape: tuple[int, ...]
    to_ours: Callable[[np.ndarray], np.ndarray] = same
    to_hf: Callable[[np.ndarray], np.ndarray] = same


@dataclass(frozen=True)
class Entry:
    """One leaf: `shape` = lead + (shape of each source after `to_ours`).

    sources are in row-major order of `lead`: lead=() one source, lead=(L,) a stack over layers,
    lead=(L, E) a stack over layers and experts. dtype: of the leaf, whatever the model is loaded in; default: that.
    """

    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    lead: tuple[int, ...] = ()
    dtype: str | None = None

    def __post_init__(self):
        if len(self.sources) != math.prod(self.lead):
            raise ValueError(f"{self.path}: {len(self.sources)} sources for lead {self.lead}")
        if self.shape[: len(self.lead)] != self.lead:
            raise ValueError(f"{self.path}: shape {self.shape} does not begin with lead {self.lead}")

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of what one source fills."""
        return self.shape[len(self.lead) :]


def heads_out(w: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:  # [N*H, D] -> [D, N, H]
    return w.T.reshape(shape)


def heads_out_back(w: np.ndarray) -> np.ndarray:
    return w.reshape(w.shape[0], -1).T


def heads_in(w: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:  # [D, N*H] -> [N, H, D]
    return w.T.reshape(shape)


def heads_in_back(w: np.ndarray) -> np.ndarray:
    return w.reshape(-1, w.shape[-1]).T
