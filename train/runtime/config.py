"""Experiments by name, presets, and typed ``key=value`` overrides (house_style.md section 14).

An experiment is a module ``configs/<name>.py`` with

* ``get_config()`` -> one frozen dataclass (nested if need be) with ``entry="module:function"`` and
  ``report="module:function"``, ``predict="module:function"`` if its runs predict (`train.predict`), and
  ``together="module:function"`` if trials of a sweep may be trained together (`train.sweep`);
* ``PRESETS``: ``{preset: {dotted key: value}}``;  ``NEEDS``: names of data and weights;
* ``MINUTES``: ``{preset: minutes on two cores}``;  ``GRIDS``: ``{grid: {variant: {dotted key: value}}}`` for sweeps;
* a docstring, whose first line `jaxmodels list` shows.

Values are typed by the annotations of the dataclass. Importing an experiment must stay light: entry points are strings.
"""

import ast
import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import pkgutil
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxmodels.errors import UserError

EXPERIMENTS = "configs"  # looked up by name when a user asks for one: nothing here depends on what it holds
# Part of what an experiment is, not of how it is run.
FIXED = ("entry", "together", "report", "sweep_report", "predict", "plan")
DEFAULT_PRESET = "default"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The tail of an error message: the nearest known word, or all of them when they are few."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not near:  # `size` for `expert.size`: compare the last parts of dotted names too
        near = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]][:1]
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(known)}" if known else "there are none"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a module in ``configs/`` declares."""

    name: str
    line: str  # first line of the docstring
    doc: str
    get_config: Callable[[], Any]
    presets: Mapping[str, Mapping[str, object]]
    needs: tuple[str, ...]
    minutes: Mapping[str, float]
    grids: Mapping[str, Mapping[str, Mapping[str, object]]]


@dataclasses.dataclass(frozen=True)
class Key:
    """One thing that can be set from the command line."""

    name: str  # dotted
    type: str
    default: Any
    help: str


def experiment_names() -> list[str]:
    """Every experiment in ``configs/``, without importing them."""
    folders = importlib.import_module(EXPERIMENTS).__path__
    return sorted(module.name for module in pkgutil.iter_modules(folders) if not module.name.startswith("_"))


def experiment_of(run: str) -> str:
    """Of a run's name in its config.json, ``NAME``, ``NAME-sweep`` or ``NAME-sweep/variant/seed-0``: NAME."""
    return run.partition("/")[0].removesuffix("-sweep")


def find(name: str) -> Experiment:
    """The experiment called `name`; a dotted name is a module elsewhere (tests, a user's own).

    Raises UserError for an unknown name, with the nearest known one.
    """
    module_name = name if "." in name else f"{EXPERIMENTS}.{name}"
    if "." not in name and name not in experiment_names():
        raise UserError(f"unknown experiment {name!r}; {did_you_mean(name, experiment_names())}")
    if name.startswith("."):
        raise UserError(f"unknown experiment {name!r}; one that is not in {EXPERIMENTS}/ is named as a module is, a.b")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UserError(f"unknown experiment {name!r}: no module {error.name!r}") from error
        raise
    if not hasattr(module, "get_config"):
        raise UserError(f"{module_name} is not an experiment: it has no get_config()")
    doc = inspect.getdoc(module) or ""
    return Experiment(
        name=name.rpartition(".")[2],
        line=doc.partition("\n")[0],
        doc=doc,
        get_config=module.get_config,
        presets=getattr(module, "PRESETS", {}),
        needs=tuple(getattr(module, "NEEDS", ())),
        minutes=getattr(module, "MINUTES", {}),
        grids=getattr(module, "GRIDS", {}),
    )


def resolve(name: str, overrides: Iterable[str] | Mapping[str, object] = ()) -> Any:
    """The config of an experiment after its preset and the overrides, in this order.

    Args:
      name: an experiment (see `find`).
      overrides: ``["preset=quick", "experts.size=32"]`` or a mapping of dotted keys. ``preset`` may stand anywhere.

    Returns: the experiment's frozen dataclass.
    Raises UserError for an unknown preset or key and for a value that its annotation does not allow.
    """
    experiment = find(name)
    given = dict(overrides) if isinstance(overrides, Mapping) else dict(map(split_override, overrides))
    preset = given.pop("preset", DEFAULT_PRESET)
    if preset != DEFAULT_PRESET and preset not in experiment.presets:
        raise UserError(f"unknown preset {preset!r}; {did_you_mean(preset, {DEFAULT_PRESET, *experiment.presets})}")
    return override(experiment.get_config(), {**experiment.presets.get(preset, {}), **given})


def override(config: Any, values: Mapping[str, object]) -> Any:
    """`config` with dotted `values` replaced. Each group is rebuilt once, so that values that must fit together do.

    A string is read as its annotation says (``8`` for int, ``de,fr`` for tuple[str, ...], ``none`` for Optional).
    """
    known = {key.name for key in keys(config)}
    groups = {name.rpartition(".")[0] for name in known if "." in name}
    for name in values:
        if name in groups and isinstance(values[name], str):
            inside = sorted(key for key in known if key.startswith(name + "."))
            raise UserError(f"{name} is a group of keys; set {inside[0]}=... or another of its {len(inside)} keys")
        if name not in known | groups:
            raise UserError(f"unknown key {name!r}; {did_you_mean(name, known)}")
    return _rebuild(config, values, "")


def keys(config: Any, prefix: str = "") -> list[Key]:
    """Every key of `config` that can be overridden, nested dataclasses flattened, with what is known about it."""
    hints, comments, found = _hints(type(config)), _comments(type(config)), []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if not field.init or name in FIXED:
            continue
        if dataclasses.is_dataclass(value):
            found += keys(value, name + ".")
        else:
            note = field.metadata.get("help") or comments.get(field.name, "")
            found.append(Key(name, _type_name(hints[field.name]), value, note))
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON values (tuples become lists, paths text)."""
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(config)


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """The config that `to_dict` has written, with defaults for what it lacks. Raises UserError if it fits no more."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"the recorded config has {key}={problem['input']!r} ({problem['msg']}); it was written by "
                        "another version: run the experiment again") from None


def defaults_of(config: Any) -> dict[str, Any]:
    """What the config's class alone says, as plain JSON values; {} for a class that needs arguments."""
    try:
        return to_dict(type(config)())
    except TypeError:
        return {}


def config_hash(config: Mapping[str, Any]) -> str:
    """Eight hex digits that name a resolved config: equal for equal values whatever their order."""
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2s(canonical.encode(), digest_size=4).hexdigest()


def load_function(path: str) -> Callable[..., Any]:
    """The function named ``"module:function"``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def split_override(text: str) -> tuple[str, str]:
    """``key=value`` as (key, value). Raises UserError if it is not."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UserError(f"{text!r} is not key=value; write it as {text.strip('= ') or 'key'}=VALUE")
    return key.strip(), value.strip()


def _rebuild(config: Any, values: Mapping[str, object], prefix: str) -> Any:
    hints, changes = _hints(type(config)), {}
    for field in dataclasses.fields(config):
        name, current = prefix + field.name, getattr(config, field.name)
        if name in values:
            current = changes[field.name] = _typed(hints[field.name], values[name], name)
        if any(key.startswith(name + ".") for key in values):
            changes[field.name] = _rebuild(current, values, name + ".")
    try:
        return dataclasses.replace(config, **changes) if changes else config
    except ValueError as error:  # a __post_init__ that checks values together
        raise error if isinstance(error, UserError) else UserError(f"{prefix or 'config'}: {error}") from error


def _typed(annotation: Any, value: object, name: str) -> Any:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    # pydantic takes no outer config for types that carry their own, as dataclasses do
    options = {} if dataclasses.is_dataclass(annotation) else {"config": ConfigDict(allow_inf_nan=False)}
    adapter = TypeAdapter(annotation, **options)
    problem = None
    for candidate in _readings(annotation, value):
        try:
            return adapter.validate_python(candidate)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"]
    wanted = _type_name(annotation)
    raise UserError(f"{name}={value} does not fit: expected {wanted} ({problem or 'a truth value was given'})")


def _readings(annotation: Any, value: object) -> list[object]:
    """What the text of an override may stand for, likeliest first; a value from a preset stands for itself."""
    if not isinstance(value, str) or annotation is str:
        return [value]
    readings: list[object] = [None] if value.lower() in ("none", "null") else []
    with contextlib.suppress(json.JSONDecodeError):
        parsed = json.loads(value)
        if not isinstance(parsed, bool) or "bool" in str(annotation):  # steps=true is not steps=1
            readings.append(parsed)
    readings.append(value)
    if any(word in str(annotation) for word in ("tuple", "list", "set")):  # languages=de,fr
        readings.append([part.strip() for part in value.split(",") if part.strip()])
    return readings


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation.__name__
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *rules = typing.get_args(annotation)
        return f"{_type_name(inner)} ({', '.join(map(repr, rules))})"
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    return str(annotation).replace("typing.", "").replace("NoneType", "None")


def _comments(cls: type) -> dict[str, str]:
    """The comment at the end of each field's line: what `jaxmodels run NAME --help` says about the key."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # made at run time: no source
        return {}
    lines, comments = source.splitlines(), {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            after = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
            comments[node.target.id] = after.partition("#")[2].strip()
    return comments
