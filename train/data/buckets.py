"""Proteins of like length side by side: a batch is as long as its bucket, and there are as many shapes as buckets."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.esm.alphabet import pad_batch

LENGTHS = (128, 256, 512, 1024)  # tokens, <cls> and <eos> included


@dataclasses.dataclass(frozen=True)
class Bucketed:
    """One batch: tokens int32[B, T], T one of the buckets; index int[n <= B], which proteins its first rows are."""

    tokens: np.ndarray
    index: np.ndarray

    def fill(self, values: np.ndarray, other: int | None = None) -> np.ndarray:
        """[B]: values of the rows' proteins; of the copies that fill the batch those of the first row, or `other`."""
        mine = np.asarray(values)[self.index]
        rest = len(self.tokens) - len(mine)
        return np.concatenate([mine, np.repeat(mine[:1] if other is None else np.array([other], mine.dtype), rest)])


def bucketed(rows: Sequence[np.ndarray], tokens: int = 4096, lengths: Sequence[int] = LENGTHS) -> list[Bucketed]:
    """Batches of about `tokens` tokens of all rows (ids, int32[T]), short ones first; every row is in one.

    All batches of a bucket have one shape, whatever the rows, so that a model is compiled once for each bucket: what is
    short is filled up with copies of its first row, which `index` leaves out.
    Raises UserError for a row longer than the last bucket.
    """
    sizes = np.array([len(row) for row in rows], int)
    lengths = sorted(lengths)
    if len(sizes) and sizes.max() > lengths[-1]:
        raise UserError(f"row {int(sizes.argmax())} has {sizes.max()} tokens, the longest bucket {lengths[-1]}; cut it")
    order = np.argsort(sizes, kind="stable")
    bucket = np.searchsorted(lengths, sizes[order])
    batches = []
    for number, length in enumerate(lengths):
        members = order[bucket == number]
        size = max(tokens // length, 1)
        for start in range(0, len(members), size):
            index = members[start:start + size]
            filled = np.concatenate([index, np.repeat(index[:1], size - len(index))])
            batches.append(Bucketed(pad_batch([rows[i] for i in filled], length), index))
    return batches
