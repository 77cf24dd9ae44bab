"""Records of fixed-length arrays on disk: ArrayRecord files, written and read by tensorflow-datasets, no TensorFlow.

What `prepare` wrote is a TFDS data set like any other (``tfds.builder_from_directory``) with one file more,
``files.json``: name, size and number of records of every file, so that a file cut short is found when it is opened
and not in the middle of a night. Contents are covered by a checksum a record, checked by ArrayRecord at every read.
"""

import bisect
import contextlib
import fcntl
import io
import itertools
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.errors import UserError
from train.data.sources import tfds_builder
from train.data.text import decode
from train.runtime.files import CannotSave, read_json, write_json

Arrays = Mapping[str, np.ndarray]  # name -> [records, ...], all of one number of records
_RECORDS, _FILES = "records", "files.json"


class Records:
    """Random access to the records of one split: ``records[i]`` is a dict of numpy arrays. Threads may share it.

    `files`: name, size in bytes and number of records of each file, for the run's fingerprint.
    """

    def __init__(self, source: Any, features: Mapping[str, Any], paths: Sequence[Path], counts: Sequence[int]):
        self._source, self._features, self._paths = source, features, list(paths)
        self._ends = list(itertools.accumulate(counts))
        self.files = [
            {"name": path.name, "bytes": path.stat().st_size, "records": count}
            for path, count in zip(paths, counts, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index`, by name; text, which TFDS gives as bytes, is decoded here. IndexError beyond the end."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            record = self._source[index]
        except Exception as error:  # ArrayRecord raises RuntimeError, TFDS what it likes, for a damaged record
            told = " ".join(str(error).split())[:120]
            path = self._paths[bisect.bisect_right(self._ends, index)]
            raise UserError(f"{path} is damaged at record {index} ({told}); remove {path.parent} to redo it") from error
        return {name: _array(value, self._features[name]) for name, value in record.items()}


def prepare(folder: Path, splits: Mapping[str, Arrays]) -> Path:
    """Writes arrays ``[records, ...]`` by split and name to ``folder/records``, unless they are there; returns it.

    They appear whole or not at all: a preparation that was killed is redone. Of several processes on one machine that
    prepare the same folder, one does and the others wait. Raises CannotSave when the disk refuses.
    """
    target, partial = folder / _RECORDS, folder / f".{_RECORDS}.partial"
    arrays = {split: {name: np.asarray(a) for name, a in named.items()} for split, named in splits.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f".{_RECORDS}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends, however it ends
            if is_prepared(folder):
                return target
            shutil.rmtree(target, ignore_errors=True)  # damaged by hand: complete folders hold files.json
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed; nobody else holds the lock
            try:
                os.rename(_write(arrays, partial), target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CannotSave(f"cannot write {target}: {error.strerror or error}; free space or choose --out") from error
    return target


def is_prepared(folder: Path) -> bool:
    """Whether `prepare` finished here; `open_records` checks the files."""
    return (folder / _RECORDS / _FILES).exists()


def open_records(folder: Path, split: str) -> Records:
    """The records of a split that `prepare` wrote. Raises UserError for one that is not there or not whole."""
    import tensorflow_datasets as tfds

    folder = folder / _RECORDS
    files = read_json(folder / _FILES)
    if files is None:
        raise UserError(f"no records in {folder}; prepare them first")
    if split not in files:
        raise UserError(f"{folder} has no split {split!r}; it has {', '.join(files)}")
    try:
        paths, counts = [folder / one["name"] for one in files[split]], [one["records"] for one in files[split]]
        for path, one in zip(paths, files[split], strict=True):
            _check(path, one["bytes"], one["records"])
        builder = tfds.builder_from_directory(folder)
        source = builder.as_data_source(split)
    except UserError:
        raise
    except Exception as error:  # KeyError of files.json; JSON and protobuf errors of TFDS's own two files
        told = " ".join(str(error).split())[:120]
        raise UserError(f"{folder} is damaged ({told}); remove it and prepare it again") from error
    return Records(source, builder.info.features, paths, counts)


def open_tfds(name: str, split: str) -> Records:
    """The records of a split of any data set that TFDS prepared as ArrayRecord here: ``NAME[/CONFIG]``.

    Raises UserError if it is not prepared, has no such split, is TFRecord, or has files missing or cut short.
    """
    builder = tfds_builder(name)
    if split not in builder.info.splits:
        raise UserError(f"tfds:{name} has no split {split!r}; it has {', '.join(builder.info.splits)}")
    instructions = builder.info.splits[split].file_instructions
    paths, counts = [Path(one.filename) for one in instructions], [one.examples_in_shard for one in instructions]
    try:
        source = builder.as_data_source(split)
    except NotImplementedError as error:  # prepared as TFRecord, which only TensorFlow reads
        raise UserError(f"tfds:{name} is not ArrayRecord; prepare it with --file_format=array_record") from error
    for path, count in zip(paths, counts, strict=True):
        _check(path, None, count)
    return Records(source, builder.info.features, paths, counts)


def _array(value: Any, feature: Any) -> Any:
    """TFDS gives scalars as Python numbers and text as bytes."""
    if isinstance(value, bytes) and type(feature).__name__ == "Text":
        return decode(value)[0]
    if isinstance(value, (bool, int, float)):
        return np.asarray(value, feature.np_dtype)
    return value


def _check(path: Path, size: int | None, records: int) -> None:
    """Raises UserError unless the file is there, of that size, and holds so many records."""
    from array_record.python.array_record_module import ArrayRecordReader

    remedy = f"remove {path.parent} and prepare it again"
    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    if size is not None and path.stat().st_size != size:
        raise UserError(f"{path} is damaged: {path.stat().st_size} bytes, not {size}; {remedy}")
    reader = ArrayRecordReader(str(path))
    found = reader.num_records()  # 0, rather than an error, where the end of the file is damaged
    with contextlib.suppress(RuntimeError):  # the error comes here
        reader.close()
    if found != records:
        raise UserError(f"{path} is damaged: {found} readable records, not {records}; {remedy}")


def _write(splits: dict[str, dict[str, np.ndarray]], partial: Path) -> Path:
    """Writes a TFDS data set under `partial`; returns its folder, complete and flushed to disk."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import shuffle

    # Above this many bytes it would keep them in files, by TensorFlow. They are in memory anyway: once more, then.
    shuffle.MAX_MEM_BUFFER_SIZE = sys.maxsize
    shapes = [{name: (a.shape[1:], a.dtype) for name, a in arrays.items()} for arrays in splits.values()]
    lengths = {split: {len(a) for a in arrays.values()} for split, arrays in splits.items()}
    if not shapes or any(shape != shapes[0] for shape in shapes) or any(len(one) != 1 for one in lengths.values()):
        raise ValueError(f"splits need the same arrays, as long as each other; got {shapes} of lengths {lengths}")
    if empty := [split for split, one in lengths.items() if one == {0}]:
        raise UserError(f"split {empty[0]!r} has no records; give it some or leave it out")

    class Packed(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "packed"
        code_path = None  # where TFDS (4.9.10) looks for download checksums; finding it needs importlib_resources

        def _info(self) -> tfds.core.DatasetInfo:
            # Bytes: as lists of numbers, which TFDS fills one by one, a record takes seven times as long to write.
            tensors = {name: tfds.features.Tensor(shape=shape, dtype=kind, encoding="bytes" if shape else "none")
                       for name, (shape, kind) in shapes[0].items()}
            features = tfds.features.FeaturesDict(tensors)
            # without shuffling: record i of a split is row i of its arrays
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, _: Any) -> dict[str, Iterator]:
            return {split: self._generate_examples(arrays) for split, arrays in splits.items()}

        def _generate_examples(self, arrays: Arrays) -> Iterator[tuple[int, dict]]:
            for index in range(len(next(iter(arrays.values())))):
                yield index, {name: array[index] for name, array in arrays.items()}

    builder = Packed(data_dir=str(partial), file_format="array_record")
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # "Downloading and preparing", which it does not
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except RuntimeError as error:  # how ArrayRecord reports a full disk
        raise OSError(" ".join(str(error).split())[:200]) from error
    written = Path(builder.data_path)
    described = {}
    for split, info in builder.info.splits.items():
        paths = [Path(one.filename) for one in info.file_instructions]
        counts = info.shard_lengths
        for path, count in zip(paths, counts, strict=True):
            _check(path, None, count)
        described[split] = [
            {"name": path.name, "bytes": path.stat().st_size, "records": count}
            for path, count in zip(paths, counts, strict=True)
        ]
    write_json(written / _FILES, described)
    for path in [*written.iterdir(), written]:  # before the rename, or a power cut leaves a whole folder of empty files
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return written
