"""The loop in one process: resume, other meshes, changed data, bad numbers (training_runtime.md section 8)."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxmodels import UserError
from jaxmodels.errors import Interrupted
from tests import toy_training
from tests.toy_training import ToyConfig
from train.runtime.config import override, to_dict
from train.runtime.loop import NonFinite
from train.runtime.run_folder import RunFolder
from train.runtime.signals import stop


def toy(**values):
    return override(ToyConfig(), {name.replace("__", "."): value for name, value in values.items()})


def start(cfg, out, on_evaluate=lambda state: None):
    with RunFolder.open("toy", to_dict(cfg), out, operational=cfg.operational) as run:
        return toy_training.run(cfg, run, on_evaluate)


def interrupted(cfg, out):
    """A run that a signal reaches in its first evaluation."""
    def signal(state):
        stop.requested = "SIGTERM"

    try:
        with pytest.raises(Interrupted, match="stopped by SIGTERM at step"):
            start(cfg, out, signal)
    finally:
        stop.requested = None


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def stable(line):
    """What must repeat bit for bit: everything but the clock."""
    return {key: value for key, value in line.items() if key not in ("step_seconds", "tokens_per_second", "mfu")}


def leaves(state):
    is_key = lambda leaf: jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return [np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("family", ["perceptron", *(pytest.param(name, marks=pytest.mark.long)
                                                    for name in ("decoder", "moe"))])
def test_ten_and_ten_steps_equal_twenty(family, tmp_path):
    """G1: losses and every leaf, with dropout, a schedule, clipping, shuffled data, balancing biases."""
    cfg = toy(family=family)
    whole = start(cfg, tmp_path / "whole")
    interrupted(cfg, tmp_path / "halves")
    assert [line["step"] for line in lines(tmp_path / "halves")] == list(range(1, 10))  # 10 waits for its evaluation
    resumed = start(cfg, tmp_path / "halves")
    for a, b in zip(leaves(whole.state), leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [stable(line) for line in lines(tmp_path / "halves")] == [stable(line) for line in lines(tmp_path / "whole")]
    assert len({line["loss"] for line in lines(tmp_path / "whole")}) > 15


def test_every_example_once_an_epoch(tmp_path):
    cfg = toy(loop__steps=25)  # 200 examples: four epochs of 50
    start(cfg, tmp_path / "run")
    seen = np.concatenate([line["ids"] for line in lines(tmp_path / "run")])
    for epoch in range(4):
        assert sorted(seen[50 * epoch:50 * (epoch + 1)]) == list(range(50))


@pytest.mark.long
@pytest.mark.parametrize("mesh", [(4, 2, 1, 1), (8, 1, 1, 1), (2, 4, 1, 1), (1, 1, 8, 1), (2, 1, 2, 2)])
def test_continued_on_another_mesh(mesh, tmp_path):
    """G2: the same examples, and a loss that differs by rounding alone."""
    family = "moe" if mesh[2] > 1 else "decoder"
    cfg = toy(family=family)
    start(dataclasses.replace(cfg, loop=dataclasses.replace(cfg.loop)), tmp_path / "one")
    interrupted(cfg, tmp_path / "run")
    other = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, data=mesh[0], fsdp=mesh[1], expert=mesh[2],
                                                              tensor=mesh[3]))
    trained = start(other, tmp_path / "run")
    assert trained.step == 20
    one, run = lines(tmp_path / "one"), lines(tmp_path / "run")
    assert [line["ids"] for line in one] == [line["ids"] for line in run]
    assert run[10]["loss"] == pytest.approx(one[10]["loss"], rel=1e-6)
    np.testing.assert_allclose([line["loss"] for line in run], [line["loss"] for line in one], rtol=1e-3)
    sharded = jax.tree.leaves(trained.state["params"])
    assert all(len(leaf.sharding.device_set) == 8 for leaf in sharded)


@pytest.mark.parametrize("change, key", [({"seed": 1}, "seed"), ({"batch": 16}, "batch"), ({"records": 48}, "records")])
def test_changed_data_is_refused_by_name(change, key, tmp_path):
    cfg = toy()
    interrupted(cfg, tmp_path / "run")
    with pytest.raises(UserError, match=key):  # the folder compares configs
        start(dataclasses.replace(cfg, **change), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["config"] |= change  # data that changed behind the config's back
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"the data changed since the checkpoint: .*{key}.*on_change=restart"):
        start(dataclasses.replace(cfg, **change), tmp_path / "run")


@pytest.mark.parametrize("way", ["restart", "reseek"])
def test_changed_data_on_demand(way, tmp_path):
    cfg = toy()
    interrupted(cfg, tmp_path / "run")
    other = override(cfg, {"records": 48, "loop.on_change": way})
    start(other, tmp_path / "run")
    run = lines(tmp_path / "run")
    batches = toy_training.open_batches(other)
    expected = [batches.global_ids(i).tolist() for i in (range(10) if way == "restart" else range(10, 20))]
    assert [line["ids"] for line in run[10:]] == expected
    assert len(run) == 20


def test_a_batch_that_is_not_a_number_is_skipped_and_counted(tmp_path):
    cfg = toy(nan_from=12, records=500)
    start(cfg, tmp_path / "run")
    run = lines(tmp_path / "run")
    assert [line["skipped"] for line in run] == [0] * 12 + [1] * 8
    assert run[12]["loss"] is None and run[13]["loss"] > 0  # json has no NaN
    assert run[12]["bad"] == 1 and run[13]["bad"] == 0


def test_too_many_of_them_end_the_run(tmp_path):
    cfg = toy(nan_from=6, nan_batches=4, records=500, loop__max_bad_steps=3)
    with pytest.raises(NonFinite, match=r"not finite in 3 steps in a row, up to step 9 \(limit 3\)") as error:
        start(cfg, tmp_path / "run")
    assert error.value.exit_code == 65
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 10))
    named = json.loads((tmp_path / "run" / "bad_examples.json").read_text())["ids_by_step"]
    batches = toy_training.open_batches(cfg)
    assert named == {str(step): batches.global_ids(step - 1).tolist() for step in (7, 8, 9)}


def test_bad_steps_of_data_that_has_changed_since_are_not_named(tmp_path):
    cfg = toy(nan_from=8, nan_batches=2, records=500)
    interrupted(cfg, tmp_path / "run")  # at step 10, after two bad ones
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["config"]["nan_from"] = 0
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    other = override(cfg, {"nan_from": 0, "records": 480, "loop.on_change": "restart", "loop.max_bad_steps": 3})
    with pytest.raises(NonFinite, match="in 3 steps in a row, up to step 11"):
        start(other, tmp_path / "run")
    named = json.loads((tmp_path / "run" / "bad_examples.json").read_text())["ids_by_step"]
    assert named == {"11": toy_training.open_batches(other).global_ids(0).tolist()}


@pytest.mark.long
def test_accumulation_and_styles_run_in_the_loop(tmp_path):
    losses, ways = {}, {"plain": {}, "micro": {"loop__accumulate": 2}, "per_device": {"loop__style": "per_device"}}
    for name, values in ways.items():
        cfg = toy(family="decoder", mesh__data=4, **values)
        start(cfg, tmp_path / name)
        losses[name] = [line["loss"] for line in lines(tmp_path / name)]
    np.testing.assert_allclose(losses["micro"], losses["plain"], rtol=1e-4)
    np.testing.assert_allclose(losses["per_device"], losses["plain"], rtol=1e-4)


@pytest.mark.long
def test_nothing_crosses_to_the_device_unasked(tmp_path):
    """Metrics leave one step late and batches come through explicit copies: no implicit transfer in a whole run."""
    with jax.transfer_guard("disallow"):
        start(toy(family="decoder", loop__evaluate_every=100), tmp_path / "run")


def test_two_tiers_of_checkpoints(tmp_path):
    cfg = toy(loop__local_dir=str(tmp_path / "fast"), loop__local_every=2, loop__save_every=10)
    start(cfg, tmp_path / "run")
    names = lambda folder: sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())  # noqa: E731
    assert names(tmp_path / "run" / "checkpoints") == [10, 20]
    (local,) = (tmp_path / "fast").iterdir()
    assert names(local) == [16, 18]


def test_runs_that_share_a_local_folder_keep_apart(tmp_path):
    """A second run must not go on from the first one's state; nor a new one from what a removed folder left."""
    local = {"loop__local_dir": str(tmp_path / "fast"), "loop__local_every": 2, "loop__save_every": 100}
    cfg = toy(loop__steps=6, **local)
    start(toy(loop__steps=4, **local), tmp_path / "one")
    start(cfg, tmp_path / "two")
    assert [line["step"] for line in lines(tmp_path / "two")] == list(range(1, 7))
    start(cfg, tmp_path / "two", lambda state: pytest.fail("it did not find its own"))
    shutil.rmtree(tmp_path / "two")
    with RunFolder.open("toy", to_dict(cfg), tmp_path / "two", operational=cfg.operational):
        pass  # it may have begun more than once
    with pytest.raises(UserError, match=r"fast/two-.* holds checkpoints of an earlier run in .*two, which begins"):
        start(cfg, tmp_path / "two")


def test_fewer_steps_than_were_taken(tmp_path):
    start(toy(), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["config"]["loop"]["steps"] = 10
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the checkpoint is at step 20, loop.steps=10 is before it"):
        start(toy(loop__steps=10), tmp_path / "run")
