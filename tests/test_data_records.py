"""Records on disk: whole or absent, random access, damage named; all without TensorFlow."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxmodels.errors import UserError
from train.data import records
from train.data.records import is_prepared, open_records, open_tfds, prepare
from train.runtime.files import CannotSave

ROOT = Path(__file__).resolve().parents[1]


def some_records(count, seed=0):
    r = np.random.default_rng(seed)
    return {
        "tokens": r.integers(-(2**31), 2**31 - 1, (count, 9)).astype(np.int32),
        "weights": r.normal(size=(count, 2, 3)).astype(np.float32),
        "bytes": np.arange(count, dtype=np.int32),
    }


SPLITS = {"train": some_records(300), "validation": some_records(5, seed=1)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    prepare(folder, SPLITS)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def the_file(folder, split="train"):
    return folder / "records" / open_records(folder, split).files[0]["name"]


def test_more_than_tfds_keeps_in_memory(tmp_path, monkeypatch):
    """It would go on in files, and open them with TensorFlow."""
    from tensorflow_datasets.core import shuffle

    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1000)
    prepare(tmp_path, SPLITS)
    source = open_records(tmp_path, "train")
    assert [int(source[i]["bytes"]) for i in range(300)] == list(range(300))


def test_records_come_back_as_they_were(whole):
    for split, arrays in SPLITS.items():
        source = open_records(whole, split)
        assert len(source) == len(arrays["bytes"])
        for index in (*range(5), len(source) - 1):
            record = source[index]
            assert set(record) == set(arrays)
            for name, array in arrays.items():
                assert isinstance(record[name], np.ndarray) and record[name].dtype == array.dtype
                np.testing.assert_array_equal(record[name], array[index], strict=True)
        for index in (len(source), -1):
            with pytest.raises(IndexError, match=f"of {len(source)}"):
                source[index]
        path = the_file(whole, split)
        assert source.files == [{"name": path.name, "bytes": path.stat().st_size, "records": len(source)}]
    with pytest.raises(UserError, match="has no split 'test'; it has train, validation"):
        open_records(whole, "test")
    assert "tensorflow" not in sys.modules


def test_threads_share_a_source(whole):
    source = open_records(whole, "train")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: int(source[index]["bytes"]), [*range(300)] * 3))
    assert found == [*range(300)] * 3


def test_what_is_written_is_a_tfds_data_set(whole, monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    assert len(tfds.builder_from_directory(whole / "records").as_data_source("train")) == 300
    # and any prepared TFDS set reads the same: here, ours under a name that TFDS finds by itself
    data = tmp_path / "tfds/packed"
    data.mkdir(parents=True)
    shutil.copytree(whole / "records", data / "1.0.0")
    (data / "1.0.0/files.json").unlink()
    monkeypatch.setenv("JAXMODELS_DATA", str(tmp_path))
    source = open_tfds("packed", "validation")
    assert len(source) == 5 and source.files[0]["records"] == 5
    np.testing.assert_array_equal(source[3]["tokens"], SPLITS["validation"]["tokens"][3], strict=True)
    with pytest.raises(UserError, match="has no split 'test'"):
        open_tfds("packed", "test")
    path = data / "1.0.0" / source.files[0]["name"]
    path.write_bytes(path.read_bytes()[:-70_000])
    with pytest.raises(UserError, match=f"{path.name} is damaged: 0 readable records, not 5"):
        open_tfds("packed", "validation")


@pytest.mark.parametrize("keep", [0, 1000, 0.5, -1])
def test_a_file_cut_short_is_named(folder, keep):
    path = the_file(folder)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=rf"{path.name} is damaged: \d+ bytes, not {len(data)}; remove"):
        open_records(folder, "train")
    assert len(open_records(folder, "validation")) == 5  # the other file is whole


def test_a_tail_of_zeros_is_found_by_counting(folder):
    path = the_file(folder)  # what a file system without the fsync leaves after a power cut: right size, no contents
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2].ljust(len(data), b"\0"))
    with pytest.raises(UserError, match="is damaged: 0 readable records, not 300"):
        open_records(folder, "train")


def test_every_flipped_bit_is_found_or_harmless(folder):
    path = the_file(folder)
    data, found = path.read_bytes(), 0
    tokens = SPLITS["train"]["tokens"]
    for place in np.random.default_rng(0).integers(0, len(data) // 4, 40):  # of 4 blocks, the last is mostly padding
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(place % 8)
        path.write_bytes(damaged)
        try:
            source = open_records(folder, "train")
            assert all(np.array_equal(source[index]["tokens"], tokens[index]) for index in range(300))
        except UserError as error:
            assert path.name in str(error) and "\n" not in str(error)
            found += 1
    assert found >= 35  # the others hit bytes that nobody reads


@pytest.mark.parametrize("name", ["files.json", "dataset_info.json", "features.json", "data"])
@pytest.mark.parametrize("what", ["missing", "empty", "cut", "other"])
def test_each_file_missing_empty_or_cut(folder, name, what):
    path = the_file(folder) if name == "data" else folder / "records" / name
    data = path.read_bytes()
    if what == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "other": b'{"train": [{}]}'}[what])
    with pytest.raises(UserError) as error:
        open_records(folder, "train")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_preparation_that_died_is_redone_and_a_finished_one_kept(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    for place in ("write_json", "os.rename", "_check"):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(f"train.data.records.{place}", die)
            prepare(tmp_path / "data", SPLITS)
        assert not is_prepared(tmp_path / "data")
        with pytest.raises(UserError, match="no records in"):
            open_records(tmp_path / "data", "train")
    (tmp_path / "data/.records.partial").mkdir()  # what a real kill leaves
    (tmp_path / "data/.records.partial/half").write_text("half")
    prepare(tmp_path / "data", SPLITS)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [".records.lock", "records"]
    prepare(tmp_path / "data", {"train": some_records(3, seed=9)})
    assert len(open_records(tmp_path / "data", "train")) == 300


KILL = """
import sys, numpy as np
from pathlib import Path
from train.data.records import prepare
print("ready", flush=True)
prepare(Path(sys.argv[1]), {"train": {"tokens": np.zeros((100_000, 512), np.int32)}})
"""


def test_kill_9_during_prepare(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILL, tmp_path], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob(".records.partial/packed/incomplete*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert list(tmp_path.glob(".records.partial/**/*")) and not is_prepared(tmp_path)
    prepare(tmp_path, SPLITS)
    assert len(open_records(tmp_path, "train")) == 300 and not (tmp_path / ".records.partial").exists()


def test_several_prepare_at_once_and_one_writes(tmp_path, monkeypatch):
    calls, write = [], records._write
    monkeypatch.setattr(records, "_write", lambda *args: (calls.append(1), time.sleep(0.2), write(*args))[-1])
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: prepare(tmp_path, SPLITS), range(3)))
    assert paths == [tmp_path / "records"] * 3 and calls == [1]
    assert len(open_records(tmp_path, "train")) == 300


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    # the limit on file size is inherited by a process of its own; Python ignores its signal, writes fail
    ran = multiprocessing.get_context("spawn").Process(target=_prepare_with_little_space, args=(tmp_path,))
    ran.start()
    ran.join(60)
    assert ran.exitcode == CannotSave.exit_code
    assert not is_prepared(tmp_path) and not (tmp_path / ".records.partial").exists()


def _prepare_with_little_space(folder):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        prepare(folder, {"train": {"tokens": np.arange(500_000, dtype=np.int32).reshape(-1, 100)}})
    except CannotSave as error:
        assert "cannot write" in str(error) and "free space" in str(error) and "\n" not in str(error)
        os._exit(error.exit_code)


def test_bad_splits(tmp_path):
    with pytest.raises(UserError, match="split 'validation' has no records"):
        prepare(tmp_path, {"train": some_records(3), "validation": some_records(0)})
    for bad in (
        {"train": {"a": np.zeros(3), "b": np.zeros(4)}},
        {"train": {"a": np.zeros((3, 2))}, "validation": {"a": np.zeros((3, 4))}},
    ):
        with pytest.raises(ValueError, match="the same arrays"):
            prepare(tmp_path, bad)
    assert not is_prepared(tmp_path)


def test_the_described_files_are_json(whole):
    described = json.loads((whole / "records/files.json").read_text())
    assert described["train"] == open_records(whole, "train").files
    assert records.open_records(whole, "train").files[0]["records"] == 300
