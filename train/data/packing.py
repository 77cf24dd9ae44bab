"""Documents into rows of one length, offline, so that a run may change its number of processes (the order contract).

Documents, each followed by end-of-text, are laid end to end and cut every T tokens: no padding but in the last row, and
no choice to make. A document cut by a row's end goes on in the next row as a segment of its own.

What must not be cut (`pack_whole`: proteins) is laid into rows that have room for it.
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


def pack_whole(documents: Iterable[Sequence[int] | np.ndarray], length: int, pad: int, seed: int = 0
               ) -> dict[str, np.ndarray]:
    """Rows of `length` (T) tokens of whole documents, which are never cut: each into the fullest row that has room.

    Best fit, longest first, rows then shuffled by `seed`. Proteins leave 0.1 % of padding at 1024 tokens a row, and
    17 % at 512, where the median protein fills more than half a row.

    Returns:
      tokens: int32 ``[R, T]``, padded at the end with `pad`.
      segments: int32 ``[R, T]``, the document within the row, from 1; 0 is padding.
      documents: int32 ``[R, S]``, the number (place in `documents`) of each segment of a row; -1 where there is none.
    Raises UserError for a document longer than a row; empty ones are left out.
    """
    kept = {i: ids for i, ids in enumerate(np.asarray(ids, np.int32) for ids in documents) if ids.size}
    if not kept:
        raise UserError("no document has a token; give something to pack")
    longest = max(kept, key=lambda i: kept[i].size)
    if kept[longest].size > length:
        raise UserError(f"document {longest} has {kept[longest].size} tokens, a row has {length}; cut it first")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # room -> rows that have so much
    for i in sorted(kept, key=lambda i: -kept[i].size):
        size = kept[i].size
        room = next((room for room in range(size, length + 1) if with_room[room]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, length
        else:
            row = with_room[room].pop()
        rows[row].append(i)
        with_room[room - size].append(row)
    order = np.random.default_rng(seed).permutation(len(rows))
    most = max(map(len, rows))
    tokens, segments = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), np.int32)
    numbers = np.full((len(rows), most), -1, np.int32)
    for place, row in enumerate(order):
        members = rows[row]
        ids = np.concatenate([kept[i] for i in members])
        tokens[place, :len(ids)] = ids
        segments[place, :len(ids)] = np.repeat(np.arange(1, len(members) + 1), [kept[i].size for i in members])
        numbers[place, :len(members)] = members
    return {"tokens": tokens, "segments": segments, "documents": numbers}
