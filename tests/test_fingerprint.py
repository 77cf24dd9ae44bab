"""Fingerprints: the same on every mesh, another one for every flipped bit."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from train.runtime import fingerprint
from train.runtime.fingerprint import fingerprints, layout

MESHES = ((8, 1), (4, 2), (2, 4), (1, 1))
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "int16", "int8", "uint8", "uint32", "bool",
          "int4", "complex64")


class Pair(NamedTuple):
    mu: jax.Array
    nu: jax.Array


def mesh_of(shape):
    devices = np.asarray(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    return Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def sample(dtype, shape=(8, 12), seed=0):
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, 8), np.uint8)
    if dtype == "bool":
        return bits[..., 0] < 128
    if dtype == "int4":
        return np.asarray(jnp.asarray(bits[..., 0] % 16).astype(jnp.uint4).astype(jnp.int4))
    size = jnp.dtype(dtype).itemsize
    return np.ascontiguousarray(bits[..., :size]).view(jnp.dtype(dtype))[..., 0]


def reference(words):
    """Both sums of an array of words of up to 32 bits, in Python's integers."""
    full = 2**32
    sums = [0, 0]
    for position, word in enumerate(words):
        h = position * 0x85EBCA6B % full
        h = (h ^ h >> 13) * 0xC2B2AE35 % full
        first = h ^ h >> 16
        second = first * 0x9E3779B1 % full
        second ^= second >> 15
        swapped = (word << 16 | word >> 16) % full
        sums = [(sums[0] + (first | 1) * word) % full, (sums[1] + (second | 1) * swapped) % full]
    return f"{sums[0]:08x}{sums[1]:08x}"


@pytest.mark.parametrize(("dtype", "unsigned"), [("float32", "uint32"), ("bfloat16", "uint16"), ("int8", "uint8")])
def test_the_sums_are_those_of_the_reference(dtype, unsigned):
    value = sample(dtype, (3, 5))
    words = value.view(unsigned).reshape(-1).tolist()
    assert fingerprints({"x": jnp.asarray(value)}) == {"x": f"{reference(words)} {dtype}[3,5]"}


def test_equal_on_every_mesh():
    values = {dtype: sample(dtype) for dtype in DTYPES}
    plain = fingerprints({name: jnp.asarray(value) for name, value in values.items()})
    assert len(set(plain.values())) == len(DTYPES)
    for shape in MESHES:
        specs = (PartitionSpec("data"), PartitionSpec(None, "tensor"), PartitionSpec(("data", "tensor")))
        placed = {name: jax.device_put(value, NamedSharding(mesh_of(shape), specs[i % 3]))
                  for i, (name, value) in enumerate(values.items())}
        assert fingerprints(placed) == plain


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in ("bool", "int4")])
def test_every_single_bit_counts(dtype):
    value = sample(dtype, (2, 3))
    whole, seen = value.tobytes(), set()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        seen |= set(fingerprints([jnp.asarray(np.frombuffer(bytes(flipped), value.dtype).reshape(2, 3))]).values())
    assert len(seen) == 8 * len(whole) and not seen & set(fingerprints([jnp.asarray(value)]).values())


@pytest.mark.parametrize("dtype", ["bool", "int4"])
def test_every_element_of_narrow_types_counts(dtype):
    value = sample(dtype, (2, 3))
    prints = set(fingerprints([jnp.asarray(value)]).values())
    for i in np.ndindex(2, 3):
        other = value.copy()
        other[i] = not other[i] if dtype == "bool" else np.asarray(-int(other[i]) - 1).astype(value.dtype)
        prints |= set(fingerprints([jnp.asarray(other)]).values())
    assert len(prints) == 7


def test_200_random_flips_in_a_large_sharded_array():
    random = np.random.default_rng(1)
    value = random.standard_normal((64, 256)).astype(np.float32)
    sharding = NamedSharding(mesh_of((4, 2)), PartitionSpec("data", "tensor"))
    whole = fingerprints([jax.device_put(value, sharding)])
    for _ in range(200):
        words = value.view(np.uint32).copy()
        words[tuple(random.integers(0, (64, 256)))] ^= np.uint32(1) << np.uint32(random.integers(32))
        assert fingerprints([jax.device_put(words.view(np.float32), sharding)]) != whole


def test_signs_that_flip_in_pairs_do_not_cancel():
    value = jnp.asarray(np.random.default_rng(2).standard_normal(64).astype(np.float32))
    whole = fingerprints([value])
    assert fingerprints([-value]) != whole  # 64 times 2^31 is 0 in a plain sum
    pairs = [fingerprints([value.at[jnp.array([i, i + 1])].multiply(-1)])["0"] for i in range(63)]
    assert whole["0"] not in pairs and len(set(pairs)) == 63


def test_places_count_too():
    value = jnp.arange(12.0).reshape(3, 4)
    prints = [fingerprints([x])["0"] for x in (value, value[::-1], value.T.reshape(3, 4), value.at[0, 0].set(-0.0))]
    assert len(set(prints)) == 4
    assert fingerprints({"a": value, "b": value + 1}) != fingerprints({"a": value + 1, "b": value})
    assert fingerprints([value.reshape(4, 3)])["0"] != prints[0]  # the shape is part of it


def test_keys_scalars_empty_arrays_and_paths():
    state = {"rng": jax.random.key(1), "many": jax.random.split(jax.random.key(2), (2, 3)), "step": jnp.int32(3),
             "fast": jax.random.key(1, impl="rbg"), "none": jnp.zeros((0, 4)),
             "opt": (Pair(jnp.ones(2), jnp.ones(2)), {})}
    prints = fingerprints(state)
    assert set(prints) == {"rng", "many", "step", "none", "opt/0/mu", "opt/0/nu", "fast"}
    assert prints["none"] == "0" * 16 + " float32[0,4]" and prints["step"].endswith(" int32[]")
    assert prints["rng"].endswith(" key<fry>[]") and prints["fast"].endswith(" key<rbg>[]")
    assert layout(state)["many"] == "key<fry>[2,3]"
    assert fingerprints(state | {"rng": jax.random.key(2)})["rng"] != prints["rng"]
    assert fingerprints({}) == {}


def test_what_is_not_a_jax_array_is_refused():
    with pytest.raises(TypeError, match="step is of type int, not a jax array"):
        fingerprints({"step": 3})
    with pytest.raises(ValueError, match="same path"):
        layout({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})


def test_positions_beyond_32_bits_are_folded(monkeypatch):
    assert fingerprint._positions((2, 3, 4)).reshape(-1).tolist() == list(range(24))
    monkeypatch.setattr(fingerprint, "_EXACT", 8)
    folded = np.asarray(fingerprint._positions((2, 3, 4)))
    assert folded[0, 0].tolist() == [0, 1, 2, 3] and len(np.unique(folded)) == 24
    assert folded[1, 2, 3] == (5 * 0x9E3779B1 + 3) % 2**32


def test_only_sums_travel_between_devices():
    mesh = mesh_of((4, 2))
    value = jax.device_put(np.ones((64, 64), np.float32), NamedSharding(mesh, PartitionSpec("data", "tensor")))
    text = fingerprint._compiled(mesh).lower([value]).compile().as_text()
    moved = [line.split("=", 1)[1] for line in text.splitlines()
             if re.search(r"= .*\b(all-gather|all-reduce|all-to-all|collective-permute)\(", line)]
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for line in moved
             for shape in re.findall(r"\w\d+\[([\d,]*)\]", line.split("(")[0] or line)]
    assert moved and max(sizes) <= 8  # one number a device, never the array


def test_no_implicit_transfer():
    state = {"x": jnp.ones((8, 8)), "k": jax.random.key(0)}
    fingerprints(state)
    with jax.transfer_guard("disallow"):
        fingerprints(state)
