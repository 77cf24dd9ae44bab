"""Runs in lockstep: every one of them as it would be alone, wherever it begins and however it or another ends."""

import contextlib
import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from jaxmodels.errors import Interrupted, UserError
from tests import toy_training
from tests.test_training_loop import interrupted, leaves, lines, start, toy
from train.runtime import together
from train.runtime.config import to_dict
from train.runtime.loop import Loop, NonFinite
from train.runtime.mesh import use_mesh
from train.runtime.run_folder import RunFolder
from train.runtime.signals import stop
from train.runtime.together import train_together

CLOCK = ("step_seconds", "tokens_per_second", "mfu", "together")


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Seeds have the same step: here it is compiled once for each number of them, and their starts once each."""
    pieces, alone, several, known = toy_training.pieces, Loop.compile, together._compile, {}

    def kept(key, make, *about):
        if key not in known:
            known[key] = make(*about)
        return known[key]

    def plan(cfg, mesh):
        return kept((cfg.family, cfg.seed, cfg.batch, cfg.loop.accumulate, cfg.loop.steps, mesh), pieces, cfg, mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_training, "pieces", plan)
        patch.setattr(Loop, "compile", lambda self: kept((self.task.blueprint.graphdef, 0), alone, self))
        patch.setattr(together, "_compile", lambda loops: kept((loops[0].task.blueprint.graphdef, len(loops)), several,
                                                               loops))
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """seed -> (final state, lines) of a run that was trained alone."""
    root, known = tmp_path_factory.mktemp("alone"), {}

    def of(seed):
        if seed not in known:
            trained = start(toy(seed=seed), root / str(seed))
            known[seed] = leaves(trained.state), lines(root / str(seed))
        return known[seed]

    return of


def train(cfgs, root, on_evaluate=None, **changes):
    """How runs ended that were trained together in ``root/seed``. changes: of the tasks, seed -> value each."""
    mesh = toy_training.mesh_of(cfgs[0])
    on_evaluate = on_evaluate or (lambda seed: None)
    tasks = [toy_training.task_of(cfg, mesh, lambda state, cfg=cfg: on_evaluate(cfg.seed)) for cfg in cfgs]
    for name, values in changes.items():
        tasks = [dataclasses.replace(task, **{name: values.get(cfg.seed)})
                 for cfg, task in zip(cfgs, tasks, strict=True)]
    with contextlib.ExitStack() as stack, use_mesh(mesh):
        folders = [stack.enter_context(RunFolder.open("toy", to_dict(cfg), root / str(cfg.seed),
                                                      operational=cfg.operational)) for cfg in cfgs]
        return train_together(folders, [cfg.loop for cfg in cfgs], tasks, mesh)


def seeds(*numbers, **values):
    return [toy(seed=seed, **values) for seed in numbers]


def same(root, alone, seed, end=None, steps=20):
    """The run of a seed is as it would be alone: examples exactly, numbers up to rounding."""
    state, whole = alone(seed)
    found = lines(root / str(seed))
    assert [line["step"] for line in found] == list(range(1, steps + 1))
    for one, other in zip(found, whole, strict=False):
        one, other = ({key: value for key, value in line.items() if key not in CLOCK} for line in (one, other))
        assert one["ids"] == other["ids"] and one.keys() == other.keys()
        assert {key: value for key, value in one.items() if key != "ids"} == pytest.approx(
            {key: value for key, value in other.items() if key != "ids"}, rel=1e-4, abs=1e-6)
    if end is not None:
        assert end.step == 20
        for one, other in zip(leaves(end.state), state, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_each_is_trained_as_it_would_be_alone(alone, tmp_path):
    ends = train(seeds(0, 1, 2), tmp_path)
    for seed, end in enumerate(ends):
        same(tmp_path, alone, seed, end)
        assert {line["together"] for line in lines(tmp_path / str(seed))} == {3}
        assert sorted(int(p.name) for p in (tmp_path / str(seed) / "checkpoints").iterdir()) == [10, 15, 20]
    assert len({line["loss"] for seed in range(3) for line in lines(tmp_path / str(seed))}) > 50
    fractions = [end.goodput["fractions"] for end in ends]
    assert all(sum(one.values()) == pytest.approx(1, abs=0.01) and one["step"] > 0 for one in fractions)


def test_begun_alone_and_continued_beside_one_that_begins(alone, tmp_path):
    interrupted(toy(seed=0), tmp_path / "0")
    ends = train(seeds(0, 1), tmp_path)
    for seed, end in enumerate(ends):
        same(tmp_path, alone, seed, end)
    assert ["together" in line for line in lines(tmp_path / "0")] == [False] * 10 + [True] * 10
    assert ["together" in line for line in lines(tmp_path / "1")] == [True] * 10 + [False] * 10


def test_interrupted_together_and_continued_alone_or_together(alone, tmp_path):
    """A signal in the evaluation of the second of three: the first has evaluated, the third is yet to."""
    def signal(seed):
        if seed == 1:
            stop.requested = "SIGTERM"

    try:
        ends = train(seeds(0, 1, 2), tmp_path, signal)
    finally:
        stop.requested = None
    assert all(isinstance(end, Interrupted) and "at step 10, which is saved" in str(end) for end in ends)
    assert [len(lines(tmp_path / str(seed))) for seed in range(3)] == [10, 9, 9]  # 10 waits for its evaluation
    same(tmp_path, alone, 1, start(toy(seed=1), tmp_path / "1"))
    for seed, end in zip((0, 2), train(seeds(0, 2), tmp_path), strict=True):
        same(tmp_path, alone, seed, end)


def test_those_that_end_early_leave(alone, tmp_path):
    ends = train(seeds(0, 1, 2), tmp_path, over={1: lambda step: step >= 7, 2: lambda step: step >= 12})
    assert [end.step for end in ends] == [20, 7, 12]
    same(tmp_path, alone, 0, ends[0])
    same(tmp_path, alone, 1, steps=7)
    same(tmp_path, alone, 2, steps=12)
    assert [line["together"] for line in lines(tmp_path / "2")] == [3] * 7 + [2] * 5
    assert ["together" in line for line in lines(tmp_path / "0")] == [True] * 12 + [False] * 8
    again = train(seeds(0, 1, 2), tmp_path, over={1: lambda step: step >= 7, 2: lambda step: step >= 12})
    assert [end.step for end in again] == [20, 7, 12] and len(lines(tmp_path / "1")) == 7
    for one, other in zip(ends, again, strict=True):  # what is over is not trained further
        assert all(map(np.array_equal, leaves(one.state), leaves(other.state)))


def test_one_that_fails_takes_no_other_with_it(alone, tmp_path):
    cfgs = seeds(0, 1, loop__max_bad_steps=2)
    cfgs[1] = dataclasses.replace(cfgs[1], nan_from=3, nan_batches=3)
    first, second = train(cfgs, tmp_path)
    same(tmp_path, alone, 0, first)
    assert isinstance(second, NonFinite) and "not finite in 2 steps in a row" in str(second)
    named = json.loads((tmp_path / "1" / "bad_examples.json").read_text())["ids_by_step"]
    ids = {str(line["step"]): line["ids"] for line in lines(tmp_path / "1")}
    assert len(named) == 2 and named.items() <= ids.items()


def test_one_that_cannot_begin_takes_no_other_with_it(alone, tmp_path):
    interrupted(toy(seed=1), tmp_path / "1")
    for path in (tmp_path / "1" / "checkpoints").glob("*/**/*"):
        if path.is_file():
            path.write_bytes(b"")
    first, second = train(seeds(0, 1), tmp_path)
    same(tmp_path, alone, 0, first)
    assert "can be loaded" in str(second)


def test_what_does_not_fit_is_trained_in_halves(alone, tmp_path, monkeypatch):
    answers = iter([False])
    monkeypatch.setattr(together, "_fits", lambda compiled, mesh: next(answers))
    for seed, end in enumerate(train(seeds(0, 1), tmp_path)):
        same(tmp_path, alone, seed, end)
        assert not any("together" in line for line in lines(tmp_path / str(seed)))


@pytest.mark.parametrize("limit, used, fits", [(1000, 0, True), (1000, 500, False), (None, 0, True)])
def test_whether_it_fits(limit, used, fits):
    compiled = types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(
        argument_size_in_bytes=500, temp_size_in_bytes=100))
    stats = None if limit is None else {"bytes_limit": limit, "bytes_in_use": used}
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(memory_stats=lambda: stats)]))
    assert together._fits(compiled, mesh) == fits


def test_a_signal_that_asks_to_save_reaches_all(tmp_path):
    def signal(seed):
        stop.saves += seed == 0

    train(seeds(0, 1, loop__save_every=100), tmp_path, signal)
    for seed in (0, 1):
        assert sorted(int(p.name) for p in (tmp_path / str(seed) / "checkpoints").iterdir()) == [10, 20]


@pytest.mark.parametrize("change, told", [
    ({"batch": 16}, "differ in the shapes of their batches"), ({"loop__steps": 30}, r"differ in their loop.\* keys"),
    ({"loop__style": "per_device"}, "loop.style=per_device is for runs that are trained alone; leave it at auto"),
    ({"loop__wandb": True}, "loop.wandb=True is for runs that are trained alone; leave it at false, or together=1"),
    ({"family": "decoder"}, "differ in the model"),
])
def test_what_is_refused(change, told, tmp_path):
    with pytest.raises(UserError, match=told):
        train([toy(seed=0), toy(seed=1, **change)], tmp_path)


@pytest.mark.long
def test_on_a_mesh(tmp_path):
    """The runs are on every device, and each is cut as it is alone."""
    cfgs = seeds(0, 1, family="decoder", mesh__data=2, mesh__fsdp=2, loop__accumulate=2)
    ends = train(cfgs, tmp_path)
    for cfg, end in zip(cfgs, ends, strict=True):
        one = start(cfg, tmp_path / f"alone-{cfg.seed}")
        for here, there in zip(jax.tree.leaves(end.state), jax.tree.leaves(one.state), strict=True):
            assert here.sharding.is_equivalent_to(there.sharding, here.ndim)
        for key in ("loss", "ids"):
            np.testing.assert_allclose(*([line[key] for line in lines(tmp_path / name)]
                                         for name in (str(cfg.seed), f"alone-{cfg.seed}")), rtol=1e-4)
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(ends[0].state["params"]))
