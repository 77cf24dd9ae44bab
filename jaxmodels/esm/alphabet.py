"""The 33 tokens of ESM-2 and ESM-1b (facebookresearch/esm, esm/data.py; vocab.txt of the released checkpoints)."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxmodels.errors import UserError

TOKENS = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>")
CLS, PAD, EOS, UNK, MASK = (TOKENS.index(token) for token in ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>"))
STANDARD = tuple(TOKENS.index(letter) for letter in "LAGVSERTIDPKQNFYMHWC")  # ids 4..23, the 20 amino acids
_IDS = {token: i for i, token in enumerate(TOKENS)}
_TABLE = np.full(128, UNK, np.int32)  # ASCII, either case -> id
for _token, _id in _IDS.items():
    if len(_token) == 1:
        _TABLE[[ord(_token), ord(_token.lower())]] = _id


def encode(sequence: str, special: bool = True) -> tuple[np.ndarray, int]:
    """Ids of a protein, int32[T], and how many of its letters are unknown (``<unk>``).

    Every letter is one token, upper or lower case; special tokens are not read out of the text (`MASK` is set by id).
    special: put ``<cls>`` before and ``<eos>`` behind, as the models expect.
    """
    codes = np.frombuffer(sequence.encode("utf-32-le", "surrogatepass"), np.uint32)  # a number a letter
    ids = np.where(codes < 128, _TABLE[np.minimum(codes, 127)], UNK).astype(np.int32)
    unknown = int((ids == UNK).sum())
    return (np.concatenate([[CLS], ids, [EOS]]).astype(np.int32) if special else ids), unknown


def decode(ids: Iterable[Any], special: bool = False) -> str:
    """The letters of some ids. special: write ``<cls>``, ``<pad>``, ``<eos>`` too; other tokens are always written."""
    ids = [int(i) for i in ids]
    wrong = next((i for i in ids if not 0 <= i < len(TOKENS)), None)
    if wrong is not None:
        raise UserError(f"token id {wrong} is not in this vocabulary; ids are 0 to {len(TOKENS) - 1}")
    return "".join(TOKENS[i] for i in ids if special or i not in (CLS, PAD, EOS))


def token_id(token: str) -> int:
    """The id of one token, ``A`` or ``<mask>``."""
    if token not in _IDS:
        raise UserError(f"{token!r} is not a token of this vocabulary; it has {' '.join(TOKENS)}")
    return _IDS[token]


def pad_batch(rows: Iterable[np.ndarray], length: int | None = None) -> np.ndarray:
    """Rows of ids, right-padded with ``<pad>`` to ``length`` (default: the longest): int32[B, T]."""
    rows = list(rows)
    length = length or max(map(len, rows), default=0)
    out = np.full((len(rows), length), PAD, np.int32)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise UserError(f"row {i} has {len(row)} tokens, more than the length {length} to pad to; cut it first")
        out[i, :len(row)] = row
    return out
