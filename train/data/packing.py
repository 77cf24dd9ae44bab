"""Documents into rows of one length, offline, so that a run may change its number of processes (the order contract).

Documents, each followed by end-of-text, are laid end to end and cut every T tokens: no padding but in the last row, and
no choice to make. A document cut by a row's end goes on in the next row as a segment of its own.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from jaxmodels.errors import UserError


def pack(
    documents: Iterable[Sequence[int] | np.ndarray], length: int, eos: int, token_bytes: np.ndarray, seed: int = 0
) -> dict[str, np.ndarray]:
    """Rows of `length` (T) tokens of the documents, in an order drawn from `seed`; empty documents are left out.

    Args:
      documents: token ids ``[tokens]`` of each, without end-of-text.
      token_bytes: int ``[V]``, the bytes that each token stands for (`train.data.bpe.token_bytes`).
    Returns:
      tokens: int32 ``[R, T]``, padded with `eos`.
      segments: int32 ``[R, T]``, the document within the row, from 1; 0 is padding.
      bytes: int32 ``[R]``, what the predicted tokens stand for: all but the first token of each segment, which has
        nothing before it. Loss in nats / (bytes * ln 2) is bits per byte, comparable between tokenizers.
    """
    if length < 2:
        raise UserError(f"length {length} leaves nothing to predict; set it to 2 or more")
    kept = [ids for ids in (np.asarray(ids, np.int32) for ids in documents) if ids.size]
    if not kept:
        raise UserError("no document has a token; give some text to pack")
    order = np.random.default_rng(seed).permutation(len(kept))
    stream = np.concatenate([np.append(kept[index], np.int32(eos)) for index in order])
    owner = np.repeat(np.arange(len(kept)), [kept[index].size + 1 for index in order])

    padding = -len(stream) % length
    tokens = np.pad(stream, (0, padding), constant_values=eos).reshape(-1, length)
    owner = np.pad(owner, (0, padding), constant_values=-1).reshape(-1, length)
    same = owner[:, 1:] == owner[:, :-1]
    segments = np.pad(np.cumsum(~same, axis=1), ((0, 0), (1, 0))) + 1
    predicted = same & (owner[:, 1:] >= 0)
    return {
        "tokens": tokens,
        "segments": np.where(owner >= 0, segments, 0).astype(np.int32),
        "bytes": (token_bytes[tokens[:, 1:]] * predicted).sum(axis=1).astype(np.int32),
    }
