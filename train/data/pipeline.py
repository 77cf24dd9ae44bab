"""Batches in an order that depends on the seed and the global batch alone, never on the number of processes.

The order contract: ids -> seed -> shuffle -> repeat -> slice(process::n) -> load -> batch(global / n). The set of
examples in global batch i is then the same for every process count that divides the global batch, across the ends of
epochs too (repeat comes before batch), and a run is continued from one number, the examples seen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import grain
import numpy as np

from jaxmodels.errors import UserError

Transform = tuple[str, int, Callable[[dict], dict]]  # name, version, function of one record
RandomTransform = tuple[str, int, Callable[[dict, np.random.Generator], dict]]  # the same with a random stream
OnChange = Literal["raise", "restart", "reseek"]

# Threads and no worker processes: records are packed offline, so reading one costs about 0.1 ms, and workers would put
# one state each into the checkpoint and fork a process that runs JAX's threads.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)  # in batches, which come out in order


class Source(Protocol):
    """Random access to records: `train.data.records.Records`, a list of dicts."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class Batches(Iterator[dict[str, np.ndarray]]):
    """This process's part of every global batch: a dict of arrays ``[global_batch / process_count, ...]``.

    ``"id"`` is the record's index in the source, int64. Every batch is whole: at the end of the last of a finite number
    of epochs, what does not fill a global batch is left out.

    Args:
      source: records, read by several threads at once.
      transforms: (name, version, function of a record), in order. A function must give the same for the same record,
        and a record for a record: filters and packing change the length, so they run offline.
      random_transforms: (name, version, function of a record and a random generator), after those. The generator is
        made of (seed, epoch, the record's index, place in this list): the same in every process and after a restart,
        another in every epoch.
      files: name, size and number of records of the source's files, for the fingerprint.
    Raises UserError for a batch that the processes or the records cannot fill.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        global_batch: int,
        shuffle: bool = True,
        epochs: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        name: str = "",
        files: Sequence[Mapping[str, Any]] = (),
        transforms: Sequence[Transform] = (),
        random_transforms: Sequence[RandomTransform] = (),
    ):
        _check_sizes(len(source), seed, global_batch, epochs, process_index, process_count)
        self._source, self._transforms, self._random = source, tuple(transforms), tuple(random_transforms)
        self._seed = seed
        self.global_batch, self._process, self._processes = global_batch, process_index, process_count
        self._described = {
            "name": name,
            "records": len(source),
            "files": [dict(file) for file in files],
            "seed": seed,
            "global_batch": global_batch,
            "shuffle": shuffle,
            "transforms": [[name, version] for name, version, _ in (*self._transforms, *self._random)],
            "workers": 0,
        }
        # The order is made on ids rather than on the source, so that it is known without reading a record.
        ids = grain.MapDataset.range(len(source)).seed(seed)
        self._ids = (ids.shuffle() if shuffle else ids).repeat(epochs)
        self._offset, self._iterator = 0, None
        self.seek(0)

    def fingerprint(self) -> dict[str, Any]:
        """What the order depends on, as JSON. `first_ids` tells a Grain whose shuffle is another."""
        return {**self._described, "first_ids": [int(self._ids[i]) for i in range(min(8, self.global_batch))]}

    def state(self) -> dict[str, int]:
        """Where the next batch begins, as JSON, equal in all processes and for any number of them."""
        return {"next_batch": self._next, "examples_seen": self.examples_before(self._next)}

    def examples_before(self, batch: int) -> int:
        """Examples seen when global batch number `batch` begins: what to save where batches are read ahead."""
        return self._offset + batch * self.global_batch

    def seek(self, examples_seen: int) -> None:
        """Goes to where so many examples have been seen, without reading what lies before.

        Any number will do: a run that goes on with another global batch counts its batches from the remainder.
        """
        if not 0 <= examples_seen <= len(self._ids):
            raise UserError(f"examples_seen {examples_seen} is not in 0 .. {len(self._ids)}; raise the epochs")
        self.close()
        self._next, self._offset = divmod(examples_seen, self.global_batch)
        # Cut to whole global batches before the slice: of a remainder, the first processes would still fill a batch
        # and the others would not, and a step that some processes do not take hangs the rest.
        end = len(self._ids) - (len(self._ids) - self._offset) % self.global_batch
        first = self._offset + self._process
        mine = self._ids[first : end : self._processes]

        def load(place: int, index: int) -> dict[str, Any]:
            return self._load(int(index), (first + place * self._processes) // len(self._source))

        batches = mine.map_with_index(load).batch(self.global_batch // self._processes, drop_remainder=True)
        self._iterator = iter(batches.to_iter_dataset(_READ))
        self._iterator.set_state({"next_index": self._next})

    def global_ids(self, batch: int) -> np.ndarray:
        """Ids of global batch number `batch` (see `state`), of all processes: int64 ``[global_batch]``."""
        start = self.examples_before(batch)
        if not 0 <= start <= len(self._ids) - self.global_batch:
            raise IndexError(f"batch {batch} is beyond the {len(self._ids)} examples of all epochs")
        return np.array([self._ids[start + i] for i in range(self.global_batch)], np.int64)

    def close(self) -> None:
        """Ends the threads that read ahead; `seek` starts them again."""
        if self._iterator is not None:
            self._iterator.close()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            batch = next(self._iterator)
        except StopIteration:
            raise
        except Exception:  # Grain has dropped the batch; a caller that tries again must not be given the one after it
            self.seek(self.state()["examples_seen"])
            raise
        self._next += 1
        return batch

    def _load(self, index: int, epoch: int) -> dict[str, Any]:
        record = dict(self._source[index])
        for _, _, function in self._transforms:
            record = function(record)
        for place, (_, _, function) in enumerate(self._random):
            record = function(record, np.random.default_rng((self._seed, epoch, index, place)))
        return {**record, "id": np.int64(index)}


def check_fingerprint(saved: Mapping[str, Any], now: Mapping[str, Any], on_change: OnChange = "raise") -> int | None:
    """Where to go on with the data that there is now: None for the saved count of examples, 0 for the beginning.

    Raises UserError, listing what differs, if anything does and `on_change` is ``raise``.
    """
    if on_change not in ("raise", "restart", "reseek"):
        raise UserError(f"loop.on_change is {on_change!r}; set it to raise, restart or reseek")
    before, after = dict(_leaves(saved)), dict(_leaves(now))
    keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    if not keys or on_change == "reseek":
        return None
    if on_change == "restart":
        return 0
    told = [f"{key} {before.get(key, 'absent')} -> {after.get(key, 'absent')}" for key in keys]
    more = f" and {len(told) - 8} more" if len(told) > 8 else ""
    raise UserError(
        f"the data changed since the checkpoint: {', '.join(told[:8])}{more}; "
        "set loop.on_change=restart (from the first example) or loop.on_change=reseek (go on at the same count)"
    )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(``files.0.bytes``, 100) of every number and text; ids are told together, and so is an empty list."""
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)) and not path.endswith("_ids"):
        items = enumerate(value)
    if not items:
        yield path, list(value) if isinstance(value, tuple) else value
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}".lstrip("."))


def _check_sizes(records: int, seed: int, batch: int, epochs: int | None, process: int, processes: int) -> None:
    if batch < 1 or seed < 0 or (epochs is not None and epochs < 1):
        raise UserError(f"batch {batch}, seed {seed}, epochs {epochs}: set batch and epochs to 1, seed to 0 or more")
    if not 0 <= process < processes:
        raise UserError(f"process_index {process} is not below process_count {processes}; number processes from 0")
    if batch % processes:
        below = batch // processes * processes
        near = f"{below} or {below + processes}" if below else f"{processes}"
        raise UserError(f"batch {batch} is not divisible by {processes} processes; set batch to {near}")
    if records < batch:
        raise UserError(f"{records} records are fewer than a batch of {batch}; set batch to {records} or add data")
