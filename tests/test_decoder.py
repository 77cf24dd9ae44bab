"""What must hold for any decoder: causality, padding, packing, symmetries, scanning, caching, sharding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmodels import DecoderConfig, Taps, UserError
from jaxmodels.decoder.model import Cache
from jaxmodels.experts.models import unroll
from jaxmodels.hub.models import build, leaves
from tests.tiny_models import CONFIGS, DENSE, EXPERT, close, random_model

T = 10


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 97, (2, T)).astype(np.int32)


@pytest.fixture(scope="module")
def logits(model, tokens):
    return np.asarray(model(tokens)[0])


def test_later_inputs_have_exactly_no_gradient(model, tokens):
    """d logits[t] / d embedding[u] through the tap: zero for u > t, not zero for u <= t inside the window's reach."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def sensitivity(weights):
        def score(shift):
            out, _, _ = nnx.merge(graphdef, state).forward(tokens, taps=Taps(add={"embedding": shift}))
            return (out * weights[:, None]).sum()
        return jnp.abs(jax.grad(score)(jnp.zeros((2, T, 32)))).sum((0, 2))

    for t in (0, 4, T - 1):
        gradient = np.asarray(sensitivity(jnp.zeros(T).at[t].set(1.0)))
        assert (gradient[t + 1:] == 0).all() and (gradient[max(0, t - 2):t + 1] > 0).all()


def test_padding_changes_nothing(model, tokens, logits):
    """Rows padded on either side, and what stands in the padding, give the logits of the plain rows."""
    junk = np.full((2, 3), 7, np.int32)
    mask = np.ones((2, T + 3), bool)
    left_mask, right_mask = mask.copy(), mask.copy()
    left_mask[:, :3], right_mask[:, T:] = False, False
    both = np.concatenate([np.concatenate([junk, tokens], 1), np.concatenate([tokens, junk], 1)])
    masks = np.concatenate([left_mask, right_mask])
    out = np.asarray(model(both, mask=masks)[0])
    close(out[:2, 3:], logits)
    close(out[2:, :T], logits)
    other = np.where(masks, both, 55)
    assert np.array_equal(np.asarray(model(other, mask=masks)[0])[masks], out[masks])


def test_a_fully_padded_row_is_finite(model, tokens):
    mask = np.ones((2, T), bool)
    mask[1] = False
    assert np.isfinite(np.asarray(model(tokens, mask=mask)[0])).all()


@pytest.mark.parametrize("ids", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_packed_rows_equal_separate_rows(model, tokens, logits, ids):
    """Two documents and padding in one row, whatever their ids; padding often has id 0, at the end."""
    first, second = 4, T
    row = np.concatenate([tokens[0, :first], tokens[1], np.zeros(3, np.int32)])[None]
    segments = np.repeat(ids, (first, second, 3))[None].astype(np.int32)
    mask = np.arange(row.shape[1])[None] < first + second
    packed = np.asarray(model(np.repeat(row, 2, 0), segments=np.repeat(segments, 2, 0),
                              mask=np.repeat(mask, 2, 0))[0])
    close(packed[:1, :first], logits[:1, :first])
    close(packed[:1, first:first + second], logits[1:])


def test_positions_are_relative(model, tokens, logits):
    """Rotary attention sees differences only, so shifted positions change nothing."""
    close(model(tokens, positions=np.tile(np.arange(T, dtype=np.int32) + 5, (2, 1)))[0], logits, 2e-4)


def test_permuted_experts_with_their_router_columns(tokens):
    model = random_model(EXPERT)
    order = np.random.default_rng(3).permutation(5)

    def permute(path, leaf):
        if path[2:4] == ("ffn", "router"):
            return leaf[..., order]
        return leaf[:, order] if path[2:] in (("ffn", "gate"), ("ffn", "up"), ("ffn", "down")) else leaf

    permuted = build(EXPERT, {path: permute(path, leaf) for path, leaf in leaves(model).items()})
    taps = Taps(record=("router.logits",))
    (a, aux), (b, permuted_aux) = model(tokens, taps=taps), permuted(tokens, taps=taps)
    close(a, b)
    close(np.asarray(aux["router.logits"])[..., order], permuted_aux["router.logits"])
    # The same without the router: other experts answer.
    broken = {p: permute(p, leaf) if p[2:4] != ("ffn", "router") else leaf for p, leaf in leaves(model).items()}
    assert np.abs(np.asarray(build(EXPERT, broken)(tokens)[0]) - np.asarray(a)).max() > 0.1 * np.asarray(a).std()


def test_scanned_layers_equal_unrolled_ones(model, tokens, logits):
    single = unroll(model)
    assert single.cfg.groups == ((0, 1), (1, 2), (2, 3)) and model.cfg.groups == ((0, 3),)
    close(single(tokens)[0], logits)
    assert unroll(single) is single


def test_cached_steps_equal_the_full_forward_pass(model, tokens, logits):
    """A left-padded prompt of 4 tokens, then one token after another, in a cache longer than needed."""
    padded = np.concatenate([np.zeros((2, 2), np.int32), tokens], 1)
    mask = np.concatenate([np.zeros((2, 2), bool), np.ones((2, T), bool)], 1)
    graphdef, state = nnx.split(model)

    @jax.jit
    def step(tokens, mask, cache):
        out, _, cache = nnx.merge(graphdef, state).forward(tokens, mask=mask, cache=cache)
        return out, cache

    out, cache = step(padded[:, :6], mask[:, :6], Cache.empty(model.cfg, 2, 20))
    steps = [np.asarray(out)[:, 2:]]
    for t in range(6, T + 2):
        out, cache = step(padded[:, t:t + 1], mask[:, t:t + 1], cache)
        steps.append(np.asarray(out))
    close(np.concatenate(steps, 1), logits)
    assert int(cache.index) == T + 2 and cache.positions[0, :T + 2].tolist() == [0, 0, *range(T)]


def test_the_head_runs_only_where_it_is_asked_for(tokens):
    model = random_model(DENSE)
    last, _ = model(tokens, logits="last")
    close(last, model(tokens)[0][:, -1:])
    nothing, aux = model(tokens, logits="none", taps=Taps(record=("ffn.output",)))
    assert nothing is None and aux["ffn.output"].shape == (3, 2, T, 32)
    hidden, _ = model(tokens, logits="hidden")
    assert hidden.shape == (2, T, 32)
    close(model.unembed(hidden), model(tokens)[0])
    with pytest.raises(UserError, match="logits 'lats' is not one of all, last, none, hidden"):
        model(tokens, logits="lats")


@pytest.mark.parametrize("change, words", [
    ({"norm_placement": "Pre"}, "norm_placement 'Pre' is not one of pre, post"),
    ({"qk_norm": "heads"}, "qk_norm 'heads' is not one of None, head, full"),
    ({"activation": "swish"}, "activation 'swish' is not one of silu"),
    ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
])  # fmt: skip
def test_settings_that_no_decoder_has(change, words):
    with pytest.raises(UserError, match=words):
        DecoderConfig.tiny(**change)


@pytest.mark.parametrize("wrong", [np.zeros(5, np.int32), np.zeros((2, 5, 1), np.int32), np.zeros((2, 5)),
                                   np.zeros((0, 5), np.int32), np.zeros((2, 0), np.int32)])
def test_tokens_of_another_shape_or_type_are_refused(wrong):
    with pytest.raises(UserError, match=r"int32\[B, T\]"):
        random_model(DENSE).forward(wrong)  # the call itself is type-checked here before it can tell


def test_ids_beyond_the_vocabulary_are_refused(tokens):
    """Not the logits of the nearest token, silently; what stands in padding does not matter."""
    model = random_model(DENSE)
    for wrong in (97, -1):
        ids, mask = tokens.copy(), np.ones(tokens.shape, bool)
        ids[1, -1] = wrong
        for given in (None, mask):
            with pytest.raises(UserError, match=f"token id {wrong} is not in the vocabulary; ids are 0 to 96"):
                model(ids, mask=given)
        mask[1, -1] = False
        assert np.isfinite(model(ids, mask=mask)[0]).all()


def test_a_sharded_batch_on_eight_devices(model):
    tokens = np.random.default_rng(5).integers(0, 97, (8, T)).astype(np.int32)
    expected = model(tokens)[0]
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    graphdef, state = nnx.split(model)
    placed = nnx.merge(graphdef, jax.device_put(state, NamedSharding(mesh, PartitionSpec())))
    taps = Taps(record=("ffn.output",))
    out, aux = placed(jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data"))), taps=taps)
    close(out, expected)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data")), out.ndim)
    assert {len(s.data) for s in out.addressable_shards} == {1}
    assert aux["ffn.output"].shape == (3, 8, T, 32)


def test_parameters_name_their_logical_axes(model):
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        names = variable.get_metadata("out_sharding")
        assert len(names) == variable[...].ndim, path
        assert names[0] == "layers" or path[0] != "groups", path


def test_compute_dtype(tokens):
    """bfloat16 compute over float32 parameters gives float32 logits, near the exact ones."""
    exact = np.asarray(random_model(DENSE)(tokens)[0])
    rough = np.asarray(random_model(dataclasses.replace(DENSE, dtype="bfloat16"))(tokens)[0])
    assert rough.dtype == np.float32
    assert 0 < np.sqrt(np.mean((rough - exact) ** 2)) < 0.1 * exact.std()
