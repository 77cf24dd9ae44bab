"""Experiments by name, presets and typed overrides."""

import dataclasses
from typing import Annotated

import pytest
from annotated_types import Ge

from jaxmodels.errors import UserError
from tests.tiny_experiment import Config
from train.runtime.config import config_hash, find, keys, override, resolve, to_dict

TINY = "tests.tiny_experiment"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("units=7", "units", 7),
        ("inner.size=12", "inner.size", 12),
        ("inner.rate=1e-3", "inner.rate", 0.001),
        ("inner.rate=2", "inner.rate", 2.0),
        ("inner.kind=mean", "inner.kind", "mean"),
        ("languages=de", "languages", ("de",)),
        ("languages=de, pt-BR", "languages", ("de", "pt-BR")),
        ('languages=["a,b", "c"]', "languages", ("a,b", "c")),
        ("limit=none", "limit", None),
        ("limit=5", "limit", 5),
        ("shout=yes", "shout", True),
        ("shout=false", "shout", False),
        ("note=12", "note", "12"),
        ("note=true", "note", "true"),
        ("note=a=b", "note", "a=b"),
        ("note=", "note", ""),
    ],
)
def test_values_are_typed_by_annotations(text, key, value):
    config = resolve(TINY, [text])
    for part in key.split("."):
        config = getattr(config, part)
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("unit=7", "did you mean 'units'"),
        ("size=7", "did you mean 'inner.size'"),
        ("inner.sise=7", "did you mean 'inner.size'"),
        ("units=many", "units=many does not fit: expected int"),
        ("units=1.5", "expected int"),
        ("units=true", "expected int"),
        ("inner.rate=nan", "expected float"),
        ("inner.kind=median", "expected sum|mean"),
        ("shout=loud", "expected bool"),
        ("inner=3", "inner is a group of keys"),
        ("units", "is not key=value"),
        ("=3", "is not key=value"),
        ("preset=tini", "did you mean 'tiny'"),
        ("units=0", "units 0 is below 1"),
        ("entry=os:system", "unknown key 'entry'"),
    ],
)
def test_wrong_overrides_say_what_was_meant(text, told):
    with pytest.raises(UserError, match="(?s)") as error:
        resolve(TINY, [text])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_preset_first_then_overrides_whatever_their_order():
    config = resolve(TINY, ["units=9", "preset=tiny"])
    assert (config.units, config.inner.size, config.inner.rate) == (9, 2, 0.5)
    assert resolve(TINY) == resolve(TINY, ["preset=default"]) == Config()


def test_values_that_must_fit_together_are_set_at_once():
    @dataclasses.dataclass(frozen=True)
    class Pair:
        low: int = 1
        high: int = 2

        def __post_init__(self):
            if self.low >= self.high:
                raise ValueError(f"low {self.low} is not below high {self.high}")

    assert override(Pair(), {"low": "5", "high": "6"}) == Pair(5, 6)
    with pytest.raises(UserError, match="low 5 is not below high 2"):
        override(Pair(), {"low": "5"})


def test_annotated_limits_are_kept():
    @dataclasses.dataclass(frozen=True)
    class Limited:
        size: Annotated[int, Ge(8)] = 8

    assert override(Limited(), {"size": "9"}).size == 9
    with pytest.raises(UserError, match="greater than or equal to 8"):
        override(Limited(), {"size": "7"})


def test_unknown_experiments():
    with pytest.raises(UserError, match="no module 'tests.tini_experiment'"):
        find("tests.tini_experiment")
    with pytest.raises(UserError, match="unknown experiment 'atlass'"):
        find("atlass")
    with pytest.raises(UserError, match="unknown experiment './configs/atlas.py'; one that is not in configs/"):
        find("./configs/atlas.py")
    with pytest.raises(UserError, match="is not an experiment"):
        find("tests.test_config")


def test_hash_names_the_values():
    base = to_dict(Config())
    assert config_hash(base) == config_hash(dict(reversed(base.items())))
    assert config_hash(base) != config_hash(to_dict(resolve(TINY, ["inner.size=5"])))
    assert config_hash(base) == config_hash(to_dict(resolve(TINY, ["inner.size=4"])))


def test_keys_say_type_value_and_comment():
    found = {key.name: key for key in keys(Config())}
    assert set(found) == {
        *("units", "languages", "limit", "shout", "note", "pause", "seed"),
        *("inner.size", "inner.rate", "inner.kind"),
    }
    assert (found["units"].type, found["units"].default, found["units"].help) == ("int", 3, "units of work")
    assert found["inner.kind"].type == "sum|mean" and found["limit"].type == "int | None"
    assert found["languages"].type == "tuple[str, ...]"
