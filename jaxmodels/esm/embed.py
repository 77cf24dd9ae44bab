"""Embeddings of the proteins of a FASTA file: ``jaxmodels embed``."""

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.errors import UserError
from jaxmodels.esm.alphabet import TOKENS, encode, pad_batch
from jaxmodels.esm.fasta import COUNTED, Record, clean
from jaxmodels.esm.model import Esm

POOLS = ("mean", "cls", "none")
TRAINED_LENGTH = 1022  # residues of the crops that ESM-2 was trained on (Lin et al. 2023, appendix A.2)
SHORTEST = 32  # tokens of the shortest rows
WORTH = 4  # batches that pay for the compilation of one more row length


@dataclasses.dataclass(frozen=True)
class Piece:
    """What runs through the model at once: residues start..stop-1 of a protein, of which keep_from..keep_to-1 count."""

    protein: int
    start: int
    stop: int
    keep_from: int
    keep_to: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start + 2


@dataclasses.dataclass
class Report:
    """What was done to the input, to be told; ``lines`` is the telling."""

    proteins: int = 0
    residues: int = 0
    changed: Counter = dataclasses.field(default_factory=Counter)
    records_changed: int = 0
    empty: list[str] = dataclasses.field(default_factory=list)
    repeated: list[str] = dataclasses.field(default_factory=list)
    long: list[str] = dataclasses.field(default_factory=list)
    max_length: int = TRAINED_LENGTH

    def lines(self) -> list[str]:
        out = [f"{self.proteins} proteins, {self.residues} residues"]
        if self.records_changed:
            what = "; ".join(f"{self.changed[kind]} {told}" for kind, told in COUNTED.items() if self.changed[kind])
            out.append(f"{_count(self.records_changed, 'entry', 'entries')} changed: {what}")
        if self.empty:
            out.append(f"{_count(len(self.empty), 'entry', 'entries')} without residues (NaN, length 0): "
                       f"{_few(self.empty)}")
        if self.repeated:
            out.append(f"{_count(len(self.repeated), 'name', 'names')} used by several entries, told apart by their "
                       f"order only: {_few(self.repeated)}")
        if self.long:
            out.append(f"{_count(len(self.long), 'protein', 'proteins')} longer than {self.max_length} residues, done "
                       f"in overlapping windows (--max-length): {_few(self.long)}")
        return out


def embed(model: nnx.Module, records: Sequence[Record], out: str | os.PathLike, *, pool: str = "mean",
          batch_tokens: int = 8192, max_length: int | None = None, about: str = "",
          progress: Callable[[int], contextlib.AbstractContextManager] | None = None) -> Report:
    """Writes ``out``, an .npz file that appears whole or not at all, with one entry for each record in their order.

    It holds ``names`` [P], ``lengths`` int32[P] (residues after `clean`), ``about`` (JSON), and, of the hidden states
    after the final norm, ``embeddings``: float32[P, D] for the pools ``mean`` (over residues) and ``cls``, and
    float32[sum of lengths, D] for ``none``, in which ``offsets`` int64[P + 1] says where each protein begins.

    Args:
      batch_tokens: of a batch, padding included; rows longer than that go one by one.
      max_length: residues. Longer proteins are done in windows of this length that overlap by half; a residue takes its
        state from the window whose edges are farthest, and ``cls`` is the mean over windows. Default: 1022, or what the
        table of positions holds.
      progress: ``progress(total residues)`` is entered and gives ``advance(residues)``.

    Raises UserError for options out of range, a model of another vocabulary and a file that cannot be written.
    """
    _check(model, pool, batch_tokens)
    max_length = _max_length(model, max_length)
    out = _writable(Path(out))
    report = Report(proteins=len(records), max_length=max_length)
    sequences = _cleaned(records, report)
    lengths = np.array([len(s) for s in sequences], np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    pieces = [piece for i, n in enumerate(lengths) for piece in cut(i, int(n), max_length)]
    report.long = [records[i].name for i in np.flatnonzero(lengths > max_length)]
    rows = int(offsets[-1]) if pool == "none" else len(records)
    facts = {"model": about, "pool": pool, "max_length": max_length, "dtype": model.cfg.dtype}
    small = {"names": np.array([r.name for r in records], np.str_), "lengths": lengths,
             "about": np.array(json.dumps(facts))}
    if pool == "none":
        small["offsets"] = offsets
    bar = progress(report.residues) if progress else contextlib.nullcontext(lambda n: None)
    with _new_npz(out, (rows, model.cfg.d_model), small) as embeddings, bar as advance:
        if pool != "none":
            embeddings[lengths == 0] = np.nan
        for batch, values in _run(model, sequences, pieces, pool, batch_tokens, max_length):
            for piece, value in zip(batch, values, strict=False):
                if pool == "none":
                    kept = value[1 + piece.keep_from - piece.start:1 + piece.keep_to - piece.start]
                    first = offsets[piece.protein] + piece.keep_from
                    embeddings[first:first + len(kept)] = kept
                else:  # sums over residues, or one state for each window
                    length = int(lengths[piece.protein])
                    embeddings[piece.protein] += value / (length if pool == "mean" else _windows(length, max_length))
            advance(sum(piece.keep_to - piece.keep_from for piece in batch))
    return report


def cut(protein: int, length: int, window: int) -> list[Piece]:
    """A protein as one piece, or as windows that overlap by half; every residue is kept in exactly one."""
    if length == 0:
        return []
    count = _windows(length, window)
    starts = [round(i * (length - window) / (count - 1)) for i in range(count)] if count > 1 else [0]
    stops = [min(start + window, length) for start in starts]
    # Neighbours share their overlap half and half.
    borders = [0, *((stop + start) // 2 for stop, start in zip(stops, starts[1:], strict=False)), length]
    return [Piece(protein, *piece) for piece in zip(starts, stops, borders, borders[1:], strict=False)]


def buckets(longest: int) -> list[int]:
    """Row lengths, two an octave, up to the first that holds ``longest`` tokens: one compilation for each in use."""
    out = [SHORTEST]
    while out[-1] < longest:
        out.append(out[-1] * 3 // 2 if len(out) % 2 else out[-2] * 2)
    return out


def plan(pieces: Sequence[Piece], batch_tokens: int, limit: int) -> Iterator[tuple[list[Piece], int, int]]:
    """(pieces, rows, tokens of a row, at most ``limit``) of every batch, short ones first.

    Every row length costs a compilation of a second or more, so pieces that fill few batches go up to the next longer
    rows, and so does what does not fill a batch: only the last one may be short.
    """
    order = sorted(pieces, key=lambda piece: piece.tokens)
    lengths = [min(length, limit) for length in buckets(order[-1].tokens if order else SHORTEST)]
    waiting: list[Piece] = []
    for length in lengths:
        rows = max(1, batch_tokens // length)
        while order and order[0].tokens <= length:
            fits = next((i for i, piece in enumerate(order) if piece.tokens > length), len(order))
            waiting += order[:fits]
            del order[:fits]
        if order and len(waiting) < WORTH * rows:
            continue
        for first in range(0, len(waiting) - rows + 1, rows):
            yield waiting[first:first + rows], rows, length
        waiting = waiting[len(waiting) // rows * rows:]
        if waiting and not order:
            yield waiting, min(rows, 1 << (len(waiting) - 1).bit_length()), length
            return


def _run(model, sequences, pieces, pool, batch_tokens, max_length):
    """(pieces of a batch, float32[rows, D] or [rows, T, D]) of every batch."""
    graphdef, state = nnx.split(model)
    for batch, rows, length in plan(pieces, batch_tokens, max_length + 2):
        tokens = pad_batch([encode(sequences[piece.protein][piece.start:piece.stop])[0] for piece in batch], length)
        tokens = np.concatenate([tokens, np.full((rows - len(batch), length), model.cfg.pad_id, np.int32)])
        kept = np.zeros((rows, 2), np.int32)
        for row, piece in enumerate(batch):
            kept[row] = 1 + piece.keep_from - piece.start, 1 + piece.keep_to - piece.start
        yield batch, np.asarray(_states(graphdef, state, tokens, kept, pool))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _states(graphdef, state, tokens, kept, pool):
    hidden, _ = nnx.merge(graphdef, state).forward(tokens, output="hidden")
    hidden = hidden.astype(jnp.float32)
    if pool == "none":
        return hidden
    if pool == "cls":
        return hidden[:, 0]
    at = jnp.arange(tokens.shape[1])
    keep = (at >= kept[:, :1]) & (at < kept[:, 1:])
    return jnp.einsum("bt,btd->bd", keep.astype(jnp.float32), hidden, precision=jax.lax.Precision.HIGHEST)


def _cleaned(records, report: Report) -> list[str]:
    sequences = []
    for record in records:
        sequence, counts = clean(record.sequence)
        sequences.append(sequence)
        report.changed.update(counts)
        report.records_changed += bool(counts)
        report.residues += len(sequence)
        if not sequence:
            report.empty.append(record.name)
    names = Counter(record.name for record in records)
    report.repeated = [name for name, count in names.items() if count > 1]
    return sequences


def _windows(length: int, window: int) -> int:
    """How many windows that overlap by at least half a protein needs."""
    return 1 if length <= window else 1 + -(-(length - window) // max(1, window // 2))


def _check(model: nnx.Module, pool: str, batch_tokens: int) -> None:
    if pool not in POOLS:
        raise UserError(f"pool {pool!r} is not one of {', '.join(POOLS)}")
    if batch_tokens < 1:
        raise UserError(f"batch tokens {batch_tokens} must be at least 1")
    if not isinstance(model, Esm):
        raise UserError(f"embeddings of proteins need an ESM encoder; this model is a {type(model).__name__}")
    if model.cfg.vocab_size != len(TOKENS):
        raise UserError(f"this model has a vocabulary of {model.cfg.vocab_size} tokens; FASTA files are spelt in the "
                        f"{len(TOKENS)} of ESM-2 and ESM-1b")


def _max_length(model: Esm, asked: int | None) -> int:
    room = model.cfg.max_positions - model.cfg.pad_id - 1 - 2 if model.cfg.position == "learned" else 10**9
    if asked is None:
        return min(TRAINED_LENGTH, room)
    if not 1 <= asked <= room:
        limit = f"1 to {room}, what its table of positions holds" if room < 10**9 else "at least 1"
        raise UserError(f"max length {asked} must be {limit}; longer proteins are done in windows")
    return asked


def _writable(out: Path) -> Path:
    """Checked before hours of work."""
    out = out.absolute()
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"cannot write {out}: {'it' if out.is_dir() else out.parent} is "
                        f"{'a folder' if out.is_dir() else 'not a writable folder'}; choose another file")
    return out


@contextlib.contextmanager
def _new_npz(out: Path, shape: tuple[int, int], small: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
    """Yields float32 zeros of ``shape`` on disk, to be filled; then they and ``small`` become the file ``out``."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
            raw, packed = Path(work) / "embeddings.npy", Path(work) / "out.npz"
            if 0 in shape:  # cannot be mapped
                values = np.zeros(shape, np.float32)
            else:
                values = np.lib.format.open_memmap(raw, "w+", np.float32, shape)
            yield values
            if 0 in shape:
                np.save(raw, values)
            else:
                values.flush()
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for name, value in small.items():
                    with archive.open(f"{name}.npy", "w") as member:
                        np.lib.format.write_array(member, value, allow_pickle=False)
                archive.write(raw, "embeddings.npy")
            with packed.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(packed, out)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error}); free space or choose another file") from None


def _count(n: int, one: str, several: str) -> str:
    return f"{n} {one if n == 1 else several}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(name or "(no name)" for name in names[:5]) + (", ..." if len(names) > 5 else "")
