"""Tables of tuned configurations: one JSON file a kind of device, in the user's cache or shipped in this folder.

    {"schema": 1, "device": "NVIDIA H100 80GB HBM3", "entries": [
      {"implementation": "hopper", "product": "fwd", "rows": 131072, "inner": 4096, "columns": 1536, "groups": 128,
       "dtype": "bfloat16", "config": {"columns": 256, ...}, "ms": {"even": ..., "zipf": ...},
       "default_ms": {...}, "jax": "0.10.2", "date": "2026-01-31"}, ...]}

`config` null: the default was fastest. A shipped table holds measurements on that device and nothing else.
"""

import dataclasses
import datetime
import functools
import importlib
import json
import math
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jaxmodels.cache import cache_folder
from jaxmodels.errors import UserError

SCHEMA = 1
SHIPPED = Path(__file__).parent
PRODUCTS = ("fwd", "dX", "dW")
_COUNTS = ("rows", "inner", "columns", "groups")
_Key = tuple[str, str, int, int, int, str]  # implementation, product, inner, columns, groups, dtype


class _Damaged(Exception):
    """What is wrong with a table."""


def device_kind(platform_name: str | None = None) -> str:
    """What a table is for: jax's name of the accelerator, or the processor's own (jax calls every one "cpu")."""
    if (platform_name or jax.default_backend()) != "cpu":
        return jax.devices()[0].device_kind
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        first = ""
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    parts = (told.get("model name") or platform.processor() or platform.machine(), told.get("cpu family"),
             told.get("model"), f"{os.cpu_count()} threads")  # fmt: skip
    return " ".join(["cpu", *(part for part in parts if part)])


def user_table(kind: str) -> Path:
    return cache_folder() / "tuning" / _file_name(kind)


def find(kind: str, key: _Key, rows: int) -> Any:
    """The Config of the entry for `key` whose rows have the same nearest power of two; the user's before a shipped."""
    for path in (user_table(kind), SHIPPED / _file_name(kind)):
        entries = [entry for entry in _table(path, kind).get(key, ()) if _bucket(entry["rows"]) == _bucket(rows)]
        if entries:
            return min(entries, key=lambda entry: abs(math.log2(entry["rows"] / rows)))["config"]
    return None


def record(tuned: Iterable[Any], kind: str | None = None) -> Path:
    """Add what `tune` found to the user's table of this device (or `kind`), in place of older entries for the same
    call. The file is whole at every moment; of two processes at once, the second's additions stand."""
    kind = kind or device_kind()
    path = user_table(kind)
    entries = {}
    if path.exists():
        try:
            entries = {_identity(entry): entry for entry in _read(path, kind)}
        except _Damaged as problem:
            warnings.warn(f"{path} {problem}; it is replaced", stacklevel=2)
    made = {"jax": jax.__version__, "date": datetime.date.today().isoformat()}
    for one in tuned:
        entry = {name: getattr(one, name) for name in ("implementation", "product", *_COUNTS, "dtype")}
        entry |= {"config": one.config and dataclasses.asdict(one.config), "ms": one.ms, "default_ms": one.default_ms}
        entries[_identity(entry)] = entry | made
    _write(path, {"schema": SCHEMA, "device": kind, "entries": list(entries.values())})
    _table.cache_clear()
    return path


def _bucket(rows: int) -> int:
    return round(math.log2(rows)) if rows > 0 else -1


def _identity(entry: dict[str, Any]) -> tuple:
    return *_key(entry), entry["rows"]


def _key(entry: dict[str, Any]) -> _Key:
    return tuple(entry[name] for name in ("implementation", "product", "inner", "columns", "groups", "dtype"))


def _file_name(kind: str) -> str:
    return re.sub(r"[^\w.-]+", "-", kind).strip("-.").lower() + ".json"


@functools.cache
def _table(path: Path, kind: str) -> dict[_Key, list[dict[str, Any]]]:
    """Entries by key, their configurations built; empty, with one warning, if the file is not what it should be."""
    table: dict[_Key, list[dict[str, Any]]] = {}
    try:
        if not path.exists():
            return {}
        for entry in _read(path, kind):
            table.setdefault(_key(entry), []).append(entry | {"config": _config(entry)})
    except (_Damaged, OSError) as problem:
        warnings.warn(f"the tuning table {path} is ignored: it {problem}; delete it or tune again", stacklevel=2)
        return {}
    return table


def _read(path: Path, kind: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"is not JSON ({str(error)[:80]})") from None
    except OSError as error:
        raise _Damaged(f"cannot be read ({error.strerror})") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise _Damaged(f"has schema {found!r}, this version reads {SCHEMA}")
    if content.get("device") != kind:
        raise _Damaged(f"is of {content.get('device')!r}, this is {kind!r}")
    entries = content.get("entries")
    if not isinstance(entries, list):
        raise _Damaged("has no list of entries")
    for number, entry in enumerate(entries):
        if (problem := _problem(entry)) is not None:
            raise _Damaged(f"has a wrong entry {number}: {problem}")
    return entries


def _problem(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return f"{entry!r:.80}"
    for name in _COUNTS:
        if type(entry.get(name)) is not int or not 0 < entry[name] < 2**40:
            return f"{name} is {entry.get(name)!r:.80}"
    for name in ("implementation", "dtype"):
        if not isinstance(entry.get(name), str):
            return f"{name} is {entry.get(name)!r:.80}"
    if entry.get("product") not in PRODUCTS:
        return f"product is {entry.get('product')!r:.80}"
    for name in ("ms", "default_ms"):
        times = entry.get(name)
        if not isinstance(times, dict) or not times or not all(_is_time(value) for value in times.values()):
            return f"{name} is {times!r:.80}"
    try:
        _config(entry)
    except _Damaged as problem:
        return str(problem)
    return None


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _config(entry: dict[str, Any]) -> Any:
    """The implementation's Config from its fields; raises _Damaged for fields and values that it does not take."""
    fields = entry.get("config")
    if fields is None:
        return None
    kind = config_class(entry["implementation"])
    if kind is None:
        raise _Damaged(f"implementation {entry['implementation']!r} takes no config")
    known = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(fields, dict) or fields.keys() - known.keys():
        raise _Damaged(f"config is {fields!r:.80}, {kind.__qualname__} has {', '.join(known)}")
    default = kind()
    for name, value in fields.items():
        of_type = isinstance(value, known[name].type) and isinstance(value, bool) == (known[name].type is bool)
        # Where a module chooses by default (None), zero may mean none of it; elsewhere it would divide by it.
        least = 0 if getattr(default, name) is None else 1
        if not of_type or (type(value) is int and not least <= value < 2**20):
            raise _Damaged(f"config.{name} is {value!r:.80}")
    try:
        return kind(**fields)
    except (UserError, TypeError, ValueError) as error:
        raise _Damaged(f"config is refused: {error}") from None


def config_class(implementation: str) -> type | None:
    """The dataclass Config of an implementation's module, if it has one."""
    if not implementation.isidentifier():
        return None
    try:
        module = importlib.import_module(f"jaxmodels.kernels.grouped_matmul.{implementation}")
    except ImportError:
        return None
    return getattr(module, "Config", None)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
