"""What can be guessed about a hidden residue without a network: the floors beside a masked language model's loss.

* ``unigram``: how often each residue occurs in the training part;
* ``neighbours``: how often it occurs between the two residues that stand beside it (20 x 20 contexts, smoothed towards
  the product of the two one-sided tables; a side that is hidden, an end or an odd letter says nothing).

Both know how questions are made: a residue that is asked for and shown is the true one half of the time (10 % shown as
they are against 10 % replaced, by any of 20), which alone is worth 0.2 nats on the mean of all questions. A floor that
ignored it would flatter every model.
"""

import dataclasses

import numpy as np

from jaxmodels.esm.alphabet import MASK, STANDARD
from train.data.masking import MaskingConfig

FIRST, SIZE = STANDARD[0], len(STANDARD)  # the 20 standard residues are ids 4..23
NOTHING = SIZE  # a neighbour that says nothing
_SMOOTH = 20.0  # counts' worth of belief in the product of the one-sided tables


@dataclasses.dataclass
class Counts:
    """How often a residue was seen between two neighbours: float64[21, 20, 21] (left, residue, right)."""

    table: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((SIZE + 1, SIZE, SIZE + 1)))

    def add(self, tokens: np.ndarray, segments: np.ndarray) -> None:
        """Counts whole, unmasked rows: int32[..., T] each."""
        place, left, right = _around(tokens, segments)
        residue = tokens[place] - FIRST
        index = np.ravel_multi_index((left, residue, right), self.table.shape)
        self.table += np.bincount(index, minlength=self.table.size).reshape(self.table.shape)

    def unigram(self) -> np.ndarray:
        """Shares of the residues, float64[20]; one is added to every count."""
        counts = self.table.sum((0, 2)) + 1
        return counts / counts.sum()

    def neighbours(self) -> np.ndarray:
        """Shares of the residues between two neighbours, float64[21, 21, 20] (left, right, residue)."""
        share = self.unigram()
        sides = []
        for axis in (2, 0):  # of the left neighbour whatever the right, and the other way round
            counts = self.table.sum(axis)
            counts = (counts if axis == 2 else counts.T) + _SMOOTH * share
            known = counts / counts.sum(-1, keepdims=True)
            known[NOTHING] = share
            sides.append(known)
        left, right = sides
        prior = left[:, None] * right[None] / share
        prior /= prior.sum(-1, keepdims=True)
        counts = self.table.transpose(0, 2, 1).copy()
        counts[NOTHING], counts[:, NOTHING] = 0, 0  # there the one-sided tables know as much
        counts += _SMOOTH * prior
        return counts / counts.sum(-1, keepdims=True)


def floor_sums(counts: Counts, batch: dict[str, np.ndarray], masking: MaskingConfig) -> dict[str, float]:
    """Sums over the questions of a batch: weight, hidden_weight, and for each floor NAME_nll and NAME_hidden_nll.

    batch: tokens as a model sees them, segments and targets, int32[B, T]. Losses are in nats.
    """
    tokens, segments, targets = batch["tokens"], batch["segments"], batch["targets"]
    _, left, right = _around(tokens, segments, targets >= 0)
    asked = targets >= 0
    target, seen = targets[asked] - FIRST, tokens[asked]
    hidden = seen == MASK
    priors = {"unigram": np.broadcast_to(counts.unigram(), (len(target), SIZE)),
              "neighbours": counts.neighbours()[left, right]}
    shown = 1 - masking.hidden - masking.replaced
    likely = np.full((len(target), SIZE), masking.replaced / SIZE)  # P(what is seen | residue)
    rows = np.flatnonzero(~hidden)
    likely[rows, seen[rows] - FIRST] += max(shown, 0.0)
    likely[hidden] = 1
    sums = {"weight": float(len(target)), "hidden_weight": float(hidden.sum())}
    for name, prior in priors.items():
        posterior = prior * likely
        nll = -np.log(posterior[np.arange(len(target)), target] / posterior.sum(-1))
        sums |= {f"{name}_nll": float(nll.sum()), f"{name}_hidden_nll": float(nll[hidden].sum())}
    return sums


def _around(tokens: np.ndarray, segments: np.ndarray, where: np.ndarray | None = None
            ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places bool[..., T], left int[n], right int[n]): the places (default: all standard residues) and what stands
    beside each in the same protein, 0..19, or `NOTHING`."""
    code = np.where((tokens >= FIRST) & (tokens < FIRST + SIZE) & (segments > 0), tokens - FIRST, NOTHING)
    # <cls> and <eos> stand between proteins, so that a neighbour is never of another one
    pad = [(0, 0)] * (tokens.ndim - 1)
    left = np.pad(code[..., :-1], [*pad, (1, 0)], constant_values=NOTHING)
    right = np.pad(code[..., 1:], [*pad, (0, 1)], constant_values=NOTHING)
    place = code < NOTHING if where is None else where
    return place, left[place], right[place]
