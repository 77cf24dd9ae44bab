"""What the values of a config.json may be: checked before anything is computed from them."""

from collections.abc import Mapping
from typing import Any

from jaxmodels.errors import UserError

_IS = {
    "a positive integer": lambda v: type(v) is int and 0 < v < 2**31,
    "a positive number": lambda v: type(v) in (int, float) and 0 < v < 1e30,
    "true or false": lambda v: type(v) is bool,
    "an object": lambda v: isinstance(v, dict),
    "a list": lambda v: isinstance(v, list),
    "a list of integers": lambda v: isinstance(v, list) and all(type(i) is int for i in v),
    "an integer": lambda v: type(v) is int and abs(v) < 2**31,
}


def check(values: Mapping[str, Any], kinds: Mapping[str, tuple[str, ...]]) -> None:
    """kinds: one of `_IS` -> the keys that hold it. UserError names the first value of another kind."""
    for kind, keys in kinds.items():
        for key in keys:
            if key in values and not _IS[kind](values[key]):
                raise UserError(f"config.json: {key} is {values[key]!r:.80}; {kind} is needed; fetch the model's own "
                                "config.json")
