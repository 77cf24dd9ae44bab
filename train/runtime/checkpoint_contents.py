"""What a checkpoint holds: the record beside the arrays, and the arrays in the form that orbax keeps faithfully."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from train.runtime.files import plain
from train.runtime.fingerprint import by_path, layout

SCHEMA = 2


class Damaged(Exception):
    """This step cannot be trusted; the message says why."""


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as JSON types with schema number and checksum: fingerprints guard the arrays, this guards the rest."""
    record = {**plain(dict(record)), "schema": SCHEMA}
    return {**record, "digest": _digest(record)}


def unseal(text: str) -> dict[str, Any]:
    """The record in orbax's metadata file, upgraded to the current schema.

    Raises Damaged, or UserError if a newer version of this library wrote it.
    """
    try:
        record = dict(json.loads(text)["custom_metadata"])
        schema, digest = int(record["schema"]), record.pop("digest", None)
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"its metadata is damaged ({reason(error)})") from error
    if digest != _digest(record) and (digest is not None or schema == SCHEMA):  # schema 1 had no checksum
        raise Damaged("its metadata does not match its checksum")
    if schema > SCHEMA:
        raise UserError(f"the checkpoint has schema {schema} and this version reads up to {SCHEMA}; it was written "
                        f"with {record.get('versions')}: install those versions")
    if schema < 1:
        raise Damaged(f"its metadata has schema {schema}")
    while record["schema"] < SCHEMA:
        record = UPGRADES[record["schema"]](record)
    return record


def _upgrade_1_to_2(record: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 kept the order of the data flat: ``data_state`` and ``data_fingerprint`` beside everything else."""
    kept = {name: value for name, value in record.items() if name not in ("data_state", "data_fingerprint")}
    data = {"state": record.get("data_state"), "fingerprint": record.get("data_fingerprint")}
    return {**kept, "schema": 2, "data": data}


UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _upgrade_1_to_2}


def check_model(stored: Mapping[str, str], abstract: Any, where: str, *, cast: bool) -> None:
    """Raises UserError, naming the first leaf, unless the stored fingerprints are of a state like `abstract`.

    orbax would cast other dtypes without a word; cast=True allows that, between numbers.
    """
    wanted = layout(abstract)
    held = {path: text.split()[-1] for path, text in stored.items()}
    for path in sorted({*held, *wanted}):
        have, want = held.get(path, "nothing"), wanted.get(path, "nothing")
        if have == want:
            continue
        if have.split("[")[-1] == want.split("[")[-1] and "key<" not in have + want:
            if cast:
                continue
            raise UserError(f"{where}: {path} is {have} there and {want} here; pass cast=True or set the dtype")
        raise UserError(f"{where} is of another model: {path} is {have} there and {want} here; "
                        "use the config it was saved with, or another --out")


def pack(state: Any) -> dict[str, Any]:
    """A nested dict for orbax. It refuses empty arrays (left out), stores a typed key but lets the abstract dtype of
    one that is loaded go unheeded (so: uint32 data), and joins names with dots (so: escaped)."""
    return _nest({path: jax.random.key_data(leaf) if _is_key(leaf) else leaf
                  for path, leaf in by_path(state).items() if leaf.size})


def target(stored: Mapping[str, str], abstract: Any) -> dict[str, Any]:
    """What orbax is asked for: shapes and shardings of `abstract` in the stored dtypes (casting comes after checking).

    Raises ValueError for a leaf without sharding: orbax would fall back to the one in the file.
    """
    tree = {}
    for path, leaf in by_path(abstract).items():
        if leaf.sharding is None:
            raise ValueError(f"abstract leaf {path} has no sharding; give jax.ShapeDtypeStruct one")
        data = jax.eval_shape(jax.random.key_data, _bare(leaf)) if _is_key(leaf) else leaf
        dtype = data.dtype if _is_key(leaf) else _stored_dtype(stored[path])
        if data.size:  # a sharding of keys fits their data, which only has one more dimension, never split
            leaf.sharding.shard_shape(leaf.shape)  # ValueError if it does not divide, before orbax blames the file
            tree[path] = jax.ShapeDtypeStruct(data.shape, dtype, sharding=leaf.sharding)
    return _nest(tree)


def unpack(tree: Any, stored: Mapping[str, str], abstract: Any) -> Any:
    """The inverse of `pack`, as a tree like `abstract`, in the stored dtypes."""
    leaves = []
    for path, leaf in by_path(abstract).items():
        value = tree
        for name in _names(path) if leaf.size else ():
            value = value[name]
        if _is_key(leaf):
            value = value if leaf.size else np.zeros(jax.eval_shape(jax.random.key_data, _bare(leaf)).shape, np.uint32)
            value = _placed(_wrap, leaf.sharding, str(_key_impl(leaf)))(value)
        elif not leaf.size:
            value = _placed(_zeros, leaf.sharding, leaf.shape, _stored_dtype(stored[path]))()
        leaves.append(value)
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def cast_to(state: Any, abstract: Any) -> Any:
    """Arrays of other dtypes than `abstract` names, cast."""
    return jax.tree.map(lambda leaf, want: leaf if leaf.dtype == want.dtype else
                        _placed(_astype, want.sharding, want.dtype)(leaf), state, abstract)


def abstract_of(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def reason(error: BaseException) -> str:
    """One short line: the first of the deepest cause (orbax wraps it in a NoEntryError that hides it)."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__


def _wrap(impl: str) -> Callable[[Any], jax.Array]:
    return lambda data: jax.random.wrap_key_data(data, impl=impl)


def _zeros(shape: tuple[int, ...], dtype: Any) -> Callable[[], jax.Array]:
    return lambda: jnp.zeros(shape, dtype)


def _astype(dtype: Any) -> Callable[[jax.Array], jax.Array]:
    return lambda value: value.astype(dtype)


@functools.cache
def _placed(make: Callable[..., Any], sharding: Any, *settings: Any) -> Any:
    """``make(*settings)`` under jit, because arrays that span processes take part in nothing else."""
    return jax.jit(make(*settings), out_shardings=sharding)


def _stored_dtype(text: str) -> Any:
    """Of a fingerprint or a layout: ``... float32[8,16]``."""
    return jnp.dtype(text.split()[-1].split("[")[0])


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    """``threefry2x32`` of an abstract leaf: jax says it of arrays only, so a tracer is asked."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), _bare(leaf))
    return found[0]


def _bare(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _names(path: str) -> list[str]:
    return [re.sub(r"[%.]", lambda found: f"%{ord(found[0]):02X}", name) for name in path.split("/")]


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, last = _names(path)
        inner = tree
        for name in folders:
            inner = inner.setdefault(name, {})
        inner[last] = leaf
    return tree


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
