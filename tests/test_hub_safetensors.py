"""Reading safetensors: what is right is read exactly, what is wrong is named in one line."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmodels.errors import UserError
from jaxmodels.hub import open_checkpoint

CONFIG = {"model_type": "llama"}
RIGHT = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def folder_with(tmp_path, header=None, data=b"", raw=None, length=None):
    """A model folder whose file has this header (dict or bytes), data and announced header length."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    if raw is None:
        body = header if isinstance(header, bytes) else json.dumps(header).encode()
        raw = struct.pack("<Q", len(body) if length is None else length) + body + data
    (tmp_path / "model.safetensors").write_bytes(raw)
    return tmp_path


def error_of(path):
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float64", "int32", "uint8", "bool", "float8_e4m3fn"]
)
def test_reads_every_dtype_exactly(tmp_path, dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    value = np.arange(24).reshape(2, 3, 4).astype(kind)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(
        {"a": value, "empty": np.zeros((0, 3), np.float32), "scalar": np.array(3.5)}, tmp_path / "model.safetensors"
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == CONFIG and set(checkpoint.names()) == {"a", "empty", "scalar"}
    assert checkpoint.shape("a") == (2, 3, 4) and checkpoint.dtype("a") == kind
    assert checkpoint.read("a").tobytes() == value.tobytes()
    assert checkpoint.read("empty").shape == (0, 3) and checkpoint.read("scalar") == 3.5


def test_a_single_file_beside_its_config_opens(tmp_path):
    folder_with(tmp_path, {"w": RIGHT, "__metadata__": {"format": "pt"}}, bytes(16))
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    checkpoint = open_checkpoint(tmp_path / "other.safetensors")
    assert checkpoint.names() == ["w"] and checkpoint.metadata == {"format": "pt"}


def test_every_truncation_of_a_file_is_refused(tmp_path):
    folder = folder_with(tmp_path, {"w": RIGHT}, bytes(16))
    whole = (folder / "model.safetensors").read_bytes()
    assert open_checkpoint(folder).read("w").shape == (2, 2)
    for size in range(len(whole)):
        (folder / "model.safetensors").write_bytes(whole[:size])
        assert "model.safetensors" in error_of(folder)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": "F7"}, ["w", "'F7'", "BF16"]),
        ({"dtype": "F16"}, ["w", "8 bytes", "span 16"]),
        ({"dtype": ["F32"]}, ["w", "F32"]),
        ({"shape": [2, 3]}, ["w", "[2, 3]", "24 bytes", "span 16"]),
        ({"shape": [-2, -2]}, ["w", "[-2, -2]"]),
        ({"shape": [2.0, 2]}, ["w", "[2.0, 2]"]),
        ({"shape": "22"}, ["w", "22"]),
        ({"data_offsets": [16, 0]}, ["w", "[16, 0]"]),
        ({"data_offsets": [0]}, ["w", "[0]"]),
        ({"data_offsets": [4, 20]}, ["w", "byte 20", "truncated"]),
        ({"data_offsets": [2**63, 2**63 + 16]}, ["w", "truncated"]),
        ({"shape": [2**40, 2**40], "data_offsets": [0, 2**82]}, ["w", "truncated"]),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, change, words):
    message = error_of(folder_with(tmp_path, {"w": RIGHT | change}, bytes(16)))
    assert all(word in message for word in words), message


def test_holes_overlaps_and_leftovers_are_refused(tmp_path):
    later = RIGHT | {"data_offsets": [20, 36]}
    assert "begins at byte 20, expected 16" in error_of(folder_with(tmp_path, {"w": RIGHT, "v": later}, bytes(36)))
    over = RIGHT | {"data_offsets": [8, 24]}
    assert "begins at byte 8, expected 16" in error_of(folder_with(tmp_path, {"w": RIGHT, "v": over}, bytes(24)))
    assert "20 bytes of data" in error_of(folder_with(tmp_path, {"w": RIGHT}, bytes(20)))


@pytest.mark.parametrize("length", [2**63, 100_000_001, 10_000])
def test_a_wrong_header_length_is_refused_before_reading(tmp_path, length):
    assert str(length) in error_of(folder_with(tmp_path, {"w": RIGHT}, bytes(16), length=length))


def test_a_header_over_the_limit_is_not_read_even_if_the_file_is_that_long(tmp_path):
    folder = folder_with(tmp_path, {"w": RIGHT}, bytes(16), length=100_000_001)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(100_000_100)  # sparse: takes no room on disk
    assert "over the limit of 100000000 bytes" in error_of(folder)


@pytest.mark.parametrize(
    "header, word",
    [(b"{", "JSON"), (b"[]", "list"), (b"\xff\xfe", "JSON"), (b'{"w": 3}', "needs dtype"), (b"[" * 100_000, "JSON")],
)
def test_a_header_that_is_no_header(tmp_path, header, word):
    assert word in error_of(folder_with(tmp_path, header, bytes(16)))


def test_a_tensor_twice_in_the_header(tmp_path):
    row = json.dumps(RIGHT)
    assert "twice" in error_of(folder_with(tmp_path, f'{{"w": {row}, "w": {row}}}'.encode(), bytes(16)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "x.ckpt", "x.pkl"])
def test_pickles_are_refused_with_reason_and_remedy(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04")
    for path in (tmp_path, tmp_path / name):
        message = error_of(path)
        assert name in message and "pickle" in message and "safe_serialization" in message


def test_a_pickle_in_disguise(tmp_path):
    assert "pickle" in error_of(folder_with(tmp_path, raw=b"PK\x03\x04" + bytes(100)))


def write_shards(folder, weight_map, **files):
    (folder / "config.json").write_text("{}")
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_read_as_one(tmp_path):
    one, two = np.ones(3, np.float32), np.full((2, 2), 2, np.float16)
    names = {"a": "s1.safetensors", "b": "s2.safetensors"}
    checkpoint = open_checkpoint(write_shards(tmp_path, names, s1={"a": one}, s2={"b": two}))
    assert checkpoint.names() == ["a", "b"]
    np.testing.assert_array_equal(checkpoint.read("b"), two)
    assert open_checkpoint(tmp_path / "model.safetensors.index.json").shape("a") == (3,)


@pytest.mark.parametrize(
    "shard, word",
    [
        ("gone.safetensors", "missing"),
        ("../s1.safetensors", "same folder"),
        ("/etc/passwd", "same folder"),
        ("..", "same folder"),
        (7, "same folder"),
        ("s1.bin", "only .safetensors"),
    ],
)
def test_an_index_that_points_elsewhere(tmp_path, shard, word):
    folder = write_shards(tmp_path, {"a": shard}, s1={"a": np.ones(3, np.float32)})
    (folder / "s1.bin").write_bytes(b"x")
    message = error_of(folder)
    assert word in message and str(shard) in message


def test_an_index_that_names_a_tensor_its_shard_lacks(tmp_path):
    folder = write_shards(tmp_path, {"b": "s1.safetensors"}, s1={"a": np.ones(3, np.float32)})
    assert "lacks tensor b" in error_of(folder)


def test_folders_and_files_that_are_no_model(tmp_path):
    assert "no weights" in error_of(tmp_path)
    assert "no model at" in error_of(tmp_path / "gone")
    (tmp_path / "w.npz").write_bytes(b"x")
    assert ".npz" in error_of(tmp_path / "w.npz")
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    assert "config.json" in error_of(tmp_path)
    for text in ("{", "[]", "\ud800".encode("utf-8", "surrogatepass")):
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        assert "config.json" in error_of(tmp_path)


def test_names_that_are_not_text_stay_out_of_messages(tmp_path):
    for name in ("a\nb", "\x1b[31m", "x" * 2000, ""):
        assert "is not a tensor name" in error_of(folder_with(tmp_path, {name: RIGHT}, bytes(16)))
        assert len(error_of(tmp_path)) < 400
    long = "F" * 10_000
    assert len(error_of(folder_with(tmp_path, {"w": RIGHT | {"dtype": long}}, bytes(16)))) < 600
