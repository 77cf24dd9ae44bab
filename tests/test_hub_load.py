"""Leaves from checkpoints and back: exact round trips, streaming, and each kind of bad weight named."""

import json
import os
import warnings
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmodels.errors import UserError
from jaxmodels.hub import Entry, Source, load_arrays, open_checkpoint, save_arrays
from jaxmodels.hub.entries import transpose

D, F, L, E = 4, 6, 3, 2


def linear(name, rows, columns):
    return Source(name, (rows, columns), transpose, transpose)


ENTRIES = [
    Entry(("embed",), (7, D), (Source("embed.weight", (7, D)),)),
    Entry(("scale",), (), (Source("scale", ()),)),
    Entry(("layers", "up"), (L, D, F), tuple(linear(f"l.{i}.up", F, D) for i in range(L)), (L,)),
    Entry(
        ("layers", "expert"),
        (L, E, D, F),
        tuple(linear(f"l.{i}.e.{e}", F, D) for i in range(L) for e in range(E)),
        (L, E),
    ),
]


def random_tensors(dtype, seed=0):
    rng = np.random.default_rng(seed)
    return {s.name: np.asarray(rng.normal(size=s.hf_shape)).astype(dtype) for entry in ENTRIES for s in entry.sources}


def write(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def test_leaves_stack_and_transpose(tmp_path):
    tensors = random_tensors(np.float32)
    leaves = load_arrays(write(tmp_path / "m", tensors), ENTRIES)
    assert {path: leaf.shape for path, leaf in leaves.items()} == {entry.path: entry.shape for entry in ENTRIES}
    np.testing.assert_array_equal(leaves["layers", "up"][1], tensors["l.1.up"].T)
    np.testing.assert_array_equal(leaves["layers", "expert"][2, 1], tensors["l.2.e.1"].T)
    assert float(leaves[("scale",)]) == float(tensors["scale"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 200, 1])
def test_round_trip_keeps_every_byte(tmp_path, dtype, shard_bytes):
    tensors = random_tensors(dtype)
    tensors["scale"] = np.array(-0.0, dtype)
    leaves = load_arrays(write(tmp_path / "m", tensors), ENTRIES)
    out = save_arrays(tmp_path / "out", ENTRIES, leaves, {"model_type": "x"}, shard_bytes=shard_bytes)
    again = open_checkpoint(out)
    assert sorted(again.names()) == sorted(tensors) and again.metadata == {"format": "pt"}
    assert again.config == {"model_type": "x"}
    for name, value in tensors.items():
        assert again.dtype(name) == value.dtype and again.read(name).tobytes() == value.tobytes()
    files = sorted(out.glob("*.safetensors"))
    assert {5_000_000_000: len(files) == 1, 200: 1 < len(files) < len(tensors), 1: len(files) == len(tensors)}[
        shard_bytes
    ]
    assert sum(len(load_file(file)) for file in files) == len(tensors)
    if len(files) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())


def test_dtype_and_put(tmp_path):
    checkpoint = write(tmp_path / "m", random_tensors(np.float32))
    placed = []
    device = jax.devices()[-1]

    def put(path, leaf):
        placed.append(path)
        return jax.device_put(leaf, device)

    leaves = load_arrays(checkpoint, ENTRIES, "bfloat16", put=put)
    assert placed == [entry.path for entry in ENTRIES]
    assert all(leaf.dtype == ml_dtypes.bfloat16 and leaf.devices() == {device} for leaf in leaves.values())
    with pytest.raises(UserError, match="float33"):
        load_arrays(checkpoint, ENTRIES, "float33")


def test_one_leaf_on_the_host_at_a_time(tmp_path, monkeypatch):
    """Every leaf is placed, and gone from the host, before the next is allocated."""
    checkpoint = write(tmp_path / "m", random_tensors(np.float32))
    alive, empty = [], np.empty

    def allocate(*arguments, **options):
        assert all(leaf() is None for leaf in alive)
        return empty(*arguments, **options)

    def put(path, leaf):
        alive.append(weakref.ref(leaf))
        return jax.numpy.zeros(())

    monkeypatch.setattr(np, "empty", allocate)
    load_arrays(checkpoint, ENTRIES, put=put)
    assert len(alive) == len(ENTRIES)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_named(tmp_path, bad, dtype):
    tensors = random_tensors(dtype)
    tensors["l.1.e.0"][2, 3] = bad
    with pytest.raises(UserError, match=r"l\.1\.e\.0 holds 1 NaN or infinite weights of 24"):
        load_arrays(write(tmp_path / "m", tensors), ENTRIES)


def test_weights_too_large_for_the_wanted_type(tmp_path):
    tensors = random_tensors(np.float32)
    tensors["l.2.up"][0, 0] = 1e6
    checkpoint = write(tmp_path / "m", tensors)
    with pytest.raises(UserError, match=r"l\.2\.up reaches 1e\+06, too large for float16; load with dtype bfloat16"):
        load_arrays(checkpoint, ENTRIES, "float16")


def test_missing_and_misshapen_tensors(tmp_path):
    tensors = random_tensors(np.float32)
    short = {name: value for name, value in tensors.items() if name not in ("l.1.up", "l.2.up")}
    with pytest.raises(UserError, match=r"lacks tensor l\.1\.up and 1 more"):
        load_arrays(write(tmp_path / "a", short), ENTRIES)
    with pytest.raises(UserError, match=r"l\.0\.up has shape \(4, 6\), the config asks for \(6, 4\)"):
        load_arrays(write(tmp_path / "b", tensors | {"l.0.up": tensors["l.0.up"].T.copy()}), ENTRIES)


def test_extra_tensors_are_reported_once_and_known_ones_not_at_all(tmp_path):
    one = np.ones(1, np.float32)
    harmless = {"model.layers.0.self_attn.rotary_emb.inv_freq": one, "h.0.attn.bias": one, "lm_head.weight": one}
    checkpoint = write(tmp_path / "a", random_tensors(np.float32) | harmless, {"tie_word_embeddings": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_arrays(checkpoint, ENTRIES)
    checkpoint = write(tmp_path / "b", random_tensors(np.float32) | {"odd.one": one, "odd.two": one})
    with pytest.warns(UserWarning, match="2 tensors are not used by this model: odd.one, odd.two") as caught:
        load_arrays(checkpoint, ENTRIES)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_arrays(checkpoint, ENTRIES, ignore=(r"^odd\.",))


def test_saving_refuses_to_overwrite_unless_told(tmp_path):
    leaves = load_arrays(write(tmp_path / "m", random_tensors(np.float32)), ENTRIES)
    out = tmp_path / "deep" / "out"
    extra = {"note.txt": "grüße", "copy.json": tmp_path / "m" / "config.json", "raw": b"\x00"}
    save_arrays(out, ENTRIES, leaves, {"a": 1}, extra_files=extra)
    assert (out / "note.txt").read_text("utf-8") == "grüße" and (out / "copy.json").read_text() == "{}"
    with pytest.raises(UserError, match="not empty"):
        save_arrays(out, ENTRIES, leaves, {"a": 2})
    assert json.loads((out / "config.json").read_text()) == {"a": 1}
    save_arrays(out, ENTRIES, leaves, {"a": 2}, overwrite=True)
    assert json.loads((out / "config.json").read_text()) == {"a": 2} and not (out / "note.txt").exists()
    assert os.listdir(out.parent) == ["out"]
    modes = {file.stat().st_mode & 0o777 for file in out.iterdir()}
    assert modes == {(out / "config.json").stat().st_mode & 0o777}  # weights as readable as the rest
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary").write_text("mine")
    for file in ("other.txt", "config.json"):  # the latter is a run's
        (tmp_path / "home" / file).write_text("{}")
        with pytest.raises(UserError, match="not a model"):
            save_arrays(tmp_path / "home", ENTRIES, leaves, {}, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        save_arrays(tmp_path / "home" / "diary", ENTRIES, leaves, {})
    with pytest.raises(UserError, match="cannot write"):
        save_arrays(tmp_path / "home" / "diary" / "below", ENTRIES, leaves, {})


def test_a_save_that_fails_leaves_nothing_behind(tmp_path):
    leaves = load_arrays(write(tmp_path / "m", random_tensors(np.float32)), ENTRIES)
    with pytest.raises(UserError, match="cannot write"):
        save_arrays(tmp_path / "out", ENTRIES, leaves, {}, extra_files={"x": tmp_path / "gone"})
    with pytest.raises(ValueError, match="its entry says"):
        save_arrays(tmp_path / "out", ENTRIES, leaves | {("embed",): np.zeros((1, D))}, {})
    assert os.listdir(tmp_path) == ["m"]


def test_an_entry_must_add_up():
    with pytest.raises(ValueError, match="sources"):
        Entry(("a",), (2, 3), (Source("a", (3,)),), (2,))
    with pytest.raises(ValueError, match="lead"):
        Entry(("a",), (3, 2), tuple(Source(str(i), (2,)) for i in range(2)), (2,))
