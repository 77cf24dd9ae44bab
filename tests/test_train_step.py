"""One step: styles, meshes, accumulation, remat, scan, the guard (training_runtime.md section 8)."""

import contextlib
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmodels import UserError
from jaxmodels.decoder.model import Decoder
from tests.tiny_training import (
    NextToken,
    Perceptron,
    Regression,
    decoder,
    decoder_step,
    perceptron_batch,
    plan_of,
    token_batch,
)
from train.runtime.mesh import MeshConfig, batch_sharding, check_batch, make_mesh, use_mesh
from train.runtime.state import path_text
from train.runtime.step import TrainStep, make_step, replicate, shard_batch, unreplicate

SGD = optax.sgd(0.02)  # Adam would hide a gradient of the wrong size


def one_device():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def train(plan, step, mesh, batches, style="auto"):
    """(parameters on the host, losses) after one step a batch."""
    scope = contextlib.nullcontext() if style == "pmap" else use_mesh(mesh)
    with scope, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = make_step(step, plan, mesh, style)
        state = plan.init()
        if style == "pmap":
            state = replicate(state, mesh)
        losses = []
        for batch in batches:
            if style == "pmap":
                batch = shard_batch(batch, mesh, step.accumulate)
            else:
                batch = jax.device_put(batch, batch_sharding(mesh, step.accumulate))
            state, metrics = compiled(state, batch)
            losses.append(float(metrics["loss"]))
        if style == "pmap":
            state = unreplicate(state)
    return jax.device_get(state["params"]), losses


def host(state):
    """The state in numpy, without keys, which cannot be there."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: None if is_key(leaf) else np.asarray(leaf), state)


def relative(a, b):
    """Largest difference of two trees, as a share of the second one's norm."""
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    return np.linalg.norm(flat(a) - flat(b)) / np.linalg.norm(flat(b))


BATCHES = [token_batch(seed=i) for i in range(10)]


@pytest.fixture(scope="module")
def alone():
    """Ten SGD steps on one device."""
    plan, step = decoder_step(SGD, one_device())
    return jax.device_get(plan.init()["params"]), *train(plan, step, one_device(), BATCHES)


@pytest.mark.parametrize("style", ["auto", "per_device", pytest.param("pmap", marks=pytest.mark.long)])
def test_styles_agree_with_one_device(alone, style):
    mesh = make_mesh(MeshConfig())
    plan, step = decoder_step(SGD, mesh)
    params, losses = train(plan, step, mesh, BATCHES, style)
    start, want, want_losses = alone
    assert relative(params, want) <= 1e-6
    np.testing.assert_allclose(losses, want_losses, rtol=1e-6)
    moved = jax.tree.map(lambda a, b: a - b, params, start)
    wanted = jax.tree.map(lambda a, b: a - b, want, start)
    assert abs(np.linalg.norm(jax.flatten_util.ravel_pytree(moved)[0])
               / np.linalg.norm(jax.flatten_util.ravel_pytree(wanted)[0]) - 1) <= 1e-5


@pytest.mark.long
@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (4, 2, 1, 1), (2, 4, 1, 1), (2, 2, 1, 2)])
def test_meshes_agree_with_one_device(alone, shape):
    mesh = make_mesh(MeshConfig(*shape))
    plan, step = decoder_step(SGD, mesh)
    params, losses = train(plan, step, mesh, BATCHES[:3])
    _, _, want_losses = alone
    np.testing.assert_allclose(losses, want_losses[:3], rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_parameters_and_moments_lie_where_the_rules_say():
    mesh = make_mesh(MeshConfig(2, 2, 1, 2))
    plan, _ = decoder_step(optax.adamw(1e-3), mesh)
    specs = {path_text(path): leaf.sharding.spec for path, leaf in jax.tree_util.tree_leaves_with_path(plan.init())}
    assert specs["params/groups/0/ffn/up"] == specs["opt/0/mu/groups/0/ffn/up"] == P(None, "fsdp", "tensor")
    assert specs["params/embed"] == specs["opt/0/nu/embed"] == P("tensor", "fsdp")
    assert all(axis is None for axis in specs["params/norm/scale"])


@pytest.mark.long
@pytest.mark.parametrize("family", ["decoder", "perceptron"])
def test_accumulation_is_the_mean_over_tokens(family):
    """1 x 16 = 2 x 8 = 4 x 4 although the micro-batches hold different numbers of counted tokens."""
    found = {}
    mesh = one_device()
    for accumulate in (1, 2, 4):
        if family == "decoder":
            plan, step = decoder_step(SGD, mesh, accumulate)
            batch = token_batch()
        else:
            plan, _ = plan_of(lambda key: Perceptron(key, rate=0.0), SGD, mesh)
            step, batch = TrainStep(plan.graphdef, Regression(), SGD, accumulate), perceptron_batch()
        micro = {name: a if accumulate == 1 else a.reshape(accumulate, -1, *a.shape[1:]) for name, a in batch.items()}
        found[accumulate] = train(plan, step, mesh, [micro])
    for accumulate in (2, 4):
        assert relative(found[accumulate][0], found[1][0]) <= 1e-6
        np.testing.assert_allclose(found[accumulate][1], found[1][1], rtol=1e-6)


@pytest.mark.parametrize("style", ["auto", "per_device"])
def test_accumulation_on_eight_devices(alone, style):
    mesh = make_mesh(MeshConfig())
    plan, step = decoder_step(SGD, mesh, accumulate=2)
    batches = [{name: a.reshape(2, 8, *a.shape[1:]) for name, a in batch.items()} for batch in BATCHES[:3]]
    np.testing.assert_allclose(train(plan, step, mesh, batches, style)[1], alone[2][:3], rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("change", [{"remat": "nothing_saveable"}, {"remat": "dots_with_no_batch_dims_saveable"},
                                    {"scan_layers": False}, {"scan_layers": False, "remat": "dots_saveable"}])
def test_remat_and_scan_change_nothing(alone, change):
    """Unrolled layers draw other random numbers, so they start from the scanned model's weights."""
    mesh = one_device()
    plan, step = decoder_step(SGD, mesh, **change)
    state = plan.init()
    params = alone[0]
    if not change.get("scan_layers", True):
        layers = params["groups"][0]
        params = {**params, "groups": {i: jax.tree.map(lambda a, i=i: a[i:i + 1], layers) for i in range(3)}}
    compiled, losses = make_step(step, plan, mesh), []
    state = {**state, "params": jax.device_put(params, plan.shardings["params"])}
    for batch in BATCHES[:3]:
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, alone[2][:3], rtol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing():
    mesh = one_device()
    optimizer = optax.adam(1e-2)
    plan, _ = plan_of(Perceptron, optimizer, mesh)
    compiled = make_step(TrainStep(plan.graphdef, Regression(), optimizer), plan, mesh)
    state, _ = compiled(plan.init(), perceptron_batch())
    before = host(state)
    poisoned = perceptron_batch(seed=1)
    poisoned["x"][3] = np.nan
    poisoned["mask"][3] = True
    state, metrics = compiled(state, poisoned)
    assert int(metrics["skipped"]) == int(metrics["bad"]) == 1
    for part in ("params", "opt", "rest"):
        jax.tree.map(np.testing.assert_array_equal, host(state)[part], before[part])
    assert int(state["step"]) == 2
    state, metrics = compiled(state, perceptron_batch(seed=2))
    assert int(metrics["skipped"]) == 1 and int(metrics["bad"]) == 0
    changed = jax.tree.map(lambda a, b: (a != b).any(), host(state)["params"], before["params"])
    assert all(jax.tree.leaves(changed))


def test_one_compilation_over_twenty_steps():
    """Counted by jax's own event: the size of a jit cache would miss a compilation under another key."""
    seen = []
    mesh = make_mesh(MeshConfig(4, 2))
    plan, step = decoder_step(optax.adamw(1e-3), mesh)
    state = plan.init()
    batch = jax.device_put(token_batch(), batch_sharding(mesh))
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: seen.append(name) if name == "/jax/core/compile/backend_compile_duration" else None)
    with use_mesh(mesh):
        compiled = make_step(step, plan, mesh)
        for _ in range(20):
            state, _ = compiled(state, batch)
    jax.block_until_ready(state)
    assert len(seen) == 1


def test_random_streams_differ_from_step_to_step_and_repeat_from_run_to_run():
    plan, mesh = plan_of(lambda key: Perceptron(key, rate=0.5), optax.sgd(0.0))
    step = make_step(TrainStep(plan.graphdef, Regression(), optax.sgd(0.0)), plan, mesh)

    def losses():
        state, found = plan.init(), []
        for _ in range(3):
            state, metrics = step(state, perceptron_batch())
            found.append(float(metrics["loss"]))
        return found

    first = losses()
    assert len(set(first)) == 3 and losses() == first


def test_bad_input():
    mesh = make_mesh(MeshConfig(2, 2, 1, 2))
    plan, step = decoder_step(SGD, mesh)
    with pytest.raises(UserError, match="style 'fast' is unknown; choose from auto"):
        make_step(step, plan, mesh, "fast")
    with pytest.raises(UserError, match=r"mesh.fsdp = 2 cuts it; set mesh.fsdp=1 or style=auto"):
        make_step(step, plan, mesh, "per_device")
    with pytest.raises(UserError, match=r"needs a multiple of 3 devices, there are 8"):
        make_mesh(MeshConfig(-1, 3))
    with pytest.raises(UserError, match=r"needs 4 devices, there are 8"):
        make_mesh(MeshConfig(4))
    with pytest.raises(UserError, match="at most one of them is -1"):
        MeshConfig(-1, -1)
    with pytest.raises(UserError, match=r"batch 12 is not divisible .* = 8; set data.batch to 8 or 16"):
        check_batch(12, 2, mesh)
    with pytest.raises(UserError, match=r"groups/0/attention/key: dimension 2 \(heads\) has size 2, which mesh "
                                        r"axis tensor = 4 does not divide"):
        decoder_step(SGD, make_mesh(MeshConfig(2, 1, 1, 4)))
    with pytest.raises(UserError, match="remat policy 'some' is unknown; choose from none, nothing_saveable"):
        decoder(remat="some")


def test_names_are_read_from_the_variables():
    plan, _ = plan_of(lambda key: Decoder(decoder(), rngs=nnx.Rngs(params=key)), SGD)
    names = [path_text(path) for path, _ in jax.tree_util.tree_leaves_with_path(plan.abstract["params"])]
    assert "groups/0/attention/query" in names and dataclasses.is_dataclass(NextToken())
    assert jnp.issubdtype(plan.abstract["rng"].dtype, jax.dtypes.prng_key)
