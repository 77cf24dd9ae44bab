"""Fractions of wall time: they add to one, and an injected stall shows where it was."""

import time

import pytest

from train.runtime import goodput
from train.runtime.goodput import KINDS, Goodput


def test_fractions_add_to_one_and_a_stall_is_seen(tmp_path):
    good = Goodput(tmp_path / "goodput.json")
    for number in range(1, 4):
        with good.spend("data"):
            time.sleep(2.0 if number == 2 else 0.0)
        with good.step(number):
            time.sleep(0.01)
        good.reached(number)
    summary = good.summary()
    assert sum(summary["fractions"].values()) == pytest.approx(1, abs=1e-9)
    assert summary["seconds"]["data"] == pytest.approx(2, abs=0.2)
    assert set(summary["fractions"]) == set(KINDS)


def test_steps_of_an_earlier_start_are_lost(tmp_path):
    first = Goodput(tmp_path / "goodput.json")
    first.reached(5)
    first.write()
    second = Goodput(tmp_path / "goodput.json")
    for number in (4, 5, 6):  # restored at 3
        with second.step(number):
            time.sleep(0.02)
        second.reached(number)
    assert second.starts == 2
    assert second.seconds["lost"] == pytest.approx(0.04, abs=0.015)
    assert second.seconds["step"] == pytest.approx(0.02, abs=0.01)


def test_inner_time_counts_once(tmp_path):
    good = Goodput()
    with good.spend("restore"):
        time.sleep(0.02)
        with good.spend("init"):
            time.sleep(0.05)
    assert good.seconds["init"] == pytest.approx(0.05, abs=0.02)
    assert good.seconds["restore"] == pytest.approx(0.02, abs=0.02)
    with pytest.raises(ValueError, match="'sleep' is not one of"), good.spend("sleep"):
        pass


def test_a_start_that_is_killed_has_told(tmp_path, monkeypatch):
    """What it had done since its last save, which the next start does again."""
    monkeypatch.setattr(goodput, "WRITTEN", 0.02)
    killed = Goodput(tmp_path / "goodput.json")
    for number in (1, 2):
        with killed.step(number):
            time.sleep(0.03)
        killed.reached(number)
    again = Goodput(tmp_path / "goodput.json")
    assert again.furthest == 2 and again.seconds["step"] >= 0.06
