"""Attention by the kernels of GPUs: who is told what, and that it is the plain formula.

The kernels themselves need a GPU (``python3 -m benchmarks.esm_gpu`` compares them there). Pallas's is run in its
interpreter here, cuDNN's is played.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels import Esm, EsmConfig, UserError
from jaxmodels.layers import flash
from jaxmodels.layers.attention import attend
from jaxmodels.taps import NO_TAPS
from tests.tiny_esm import packed, padded, random_esm, tiny


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(flash, "_on_nvidia", lambda: True)


def plain(q, k, v, ids):
    """The formula, all [B, T, N, H]."""
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where((ids[:, :, None] == ids[:, None])[:, None], scores, -1e30)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, -1), v.astype(jnp.float32)).astype(q.dtype)


def test_runs_of_equal_numbers():
    ids = np.zeros((3, 40), np.int32)
    ids[0, :7], ids[0, 7:9], ids[0, 9:36] = 1, 2, 3
    ids[1] = 5
    ids[2] = np.arange(40)
    found = flash.groups(jnp.asarray(ids), with_runs=True)
    assert np.asarray(found.lengths)[:2].tolist() == [[7, 2, 27, 4] + [-1] * 20, [40] + [-1] * 23]
    assert np.asarray(found.starts)[:2].tolist() == [[0, 7, 9, 36] + [-1] * 21, [0] + [-1] * 24]
    assert np.asarray(found.fits).tolist() == [True, True, False] and np.array_equal(found.ids, ids)
    assert flash.groups(jnp.asarray(ids), with_runs=False).starts is None


def play_cudnn(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale):
    """jax's kernel for packed rows, from what its documentation says of these arguments."""
    assert scale == q.shape[-1] ** -0.5 and q.dtype == k.dtype == v.dtype
    assert q_offsets.shape == (len(q), q_seqlen.shape[1] + 1) and q_seqlen.dtype == q_offsets.dtype == jnp.int32
    at = jnp.arange(q.shape[1])[:, None]
    start, length = q_offsets[:, None, :-1], q_seqlen[:, None]
    inside = (at >= start) & (at < start + length) & (start >= 0)  # [B, T, RUNS]
    assert kv_seqlen is q_seqlen and kv_offsets is q_offsets
    return plain(q, k, v, jnp.where(inside.any(-1), inside.argmax(-1), -1))


def play(monkeypatch):
    kernels = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernels, "dot_product_attention", play_cudnn)


def test_packed_rows_go_to_cudnn(monkeypatch, on_gpu):
    """The whole model, several proteins in a row: what XLA's attention gives; NaN in a row with too many."""
    play(monkeypatch)
    tokens, segments, places = packed(48)
    model = random_esm(tiny(dtype="bfloat16"))

    def logits(**options):
        other = nnx.merge(nnx.split(Esm(dataclasses.replace(model.cfg, **options), rngs=nnx.Rngs(0)))[0],
                          nnx.state(model))
        return np.asarray(other(tokens, segments=segments)[0], np.float32)

    expected, found = logits(attention="xla"), logits(attention="cudnn_packed")
    for place in places:
        assert np.abs(found[0, place] - expected[0, place]).max() < 0.1 * expected.std()
    assert np.isfinite(found).all()
    monkeypatch.setattr(flash, "RUNS", len(places))  # and padding is one more
    jax.clear_caches()
    assert np.isnan(logits(attention="cudnn_packed")).all()


def test_a_mask_goes_to_cudnn(monkeypatch, on_gpu):
    """`auto` in half precision, padded rows: the public function, its implementation by name, a mask [B, 1, T, S]."""
    told = {}

    def played(q, k, v, *, mask, implementation):
        told.update(shape=mask.shape, implementation=implementation)
        scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(mask, scores, -1e30)).astype(v.dtype), v)

    tokens = padded(24)
    expected = random_esm(tiny(dtype="bfloat16", attention="xla"))(tokens)[0]
    monkeypatch.setattr(jax.nn, "dot_product_attention", played)
    found = random_esm(tiny(dtype="bfloat16"))(tokens)[0]
    assert told == {"shape": (3, 1, 24, 24), "implementation": "cudnn"}
    real = tokens != 1
    assert np.abs(np.asarray(found - expected, np.float32)[real]).max() < 0.1 * float(np.std(expected))


@pytest.mark.long
def test_pallas_kernel(monkeypatch):
    """Values and gradients, of rows with two proteins and padding."""
    monkeypatch.setattr(flash, "_INTERPRET", True)
    ids = jnp.asarray(np.repeat([[1, 2, 0]], [20, 30, 14], axis=1).repeat(2, 0), jnp.int32)
    q, k, v, weight = jax.random.normal(jax.random.key(0), (4, 2, 64, 2, 16))

    def both(attention):
        return jax.value_and_grad(lambda q, k, v: (attention(q, k, v) * weight).sum(), (0, 1, 2))(q, k, v)

    seen = jnp.ones((2, 1, 64), bool)  # which this kernel does not read
    found = both(lambda q, k, v: flash.attend("triton", q, k, v, seen, flash.groups(ids, False)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(both(lambda q, k, v: plain(q, k, v, ids))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def chosen(wanted, dtype=jnp.bfloat16, T=128, H=64, kv_heads=4, allowed=(2, 128, 128)):
    q, k = jnp.zeros((2, T, 4, H), dtype), jnp.zeros((2, kv_heads, T, H), dtype)
    return flash.choose(wanted, q, k, jnp.ones(allowed, bool))


def test_what_runs_where(on_gpu):
    assert chosen("auto") == chosen("cudnn") == "cudnn" and chosen("xla") == "xla"
    assert chosen("cudnn_packed", T=127) == "cudnn_packed" and chosen("triton") == "triton"
    for options, told in (({"dtype": jnp.float32}, "bfloat16 or float16, not float32"), ({"H": 20}, "multiple of 8"),
                          ({"T": 127}, "even number of tokens, not 127"), ({"kv_heads": 2}, "as many keys")):
        assert chosen("auto", **options) == "xla"
        with pytest.raises(UserError, match=f"attention 'cudnn' .*{told}"):
            chosen("cudnn", **options)
    with pytest.raises(UserError, match="multiple of 128 tokens, not 200"):
        chosen("triton", T=200)


def test_a_cpu_has_none_of_them():
    assert chosen("auto") == "xla"
    for name in ("cudnn", "cudnn_packed", "triton"):
        with pytest.raises(UserError, match=f"attention '{name}' needs an NVIDIA GPU; choose 'auto' or 'xla'"):
            chosen(name)
    with pytest.raises(UserError, match="attention 'flash' is not one of auto, xla, cudnn, cudnn_packed, triton"):
        EsmConfig.tiny(attention="flash")
    q, k = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 2, 4, 8))
    allowed = jnp.ones((1, 4, 4), bool)
    probe = NO_TAPS.probe(allowed[:, 0])
    assert np.array_equal(attend(q, k, k, allowed, probe, implementation="auto"), attend(q, k, k, allowed, probe))


def test_recomputation_runs_no_kernel_twice(monkeypatch, on_gpu):
    """products_saveable: one forward kernel in the program of the gradient, nothing_saveable two; products alike."""
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91_000)
    tokens, segments, _ = packed(48)

    def count(remat):
        model = random_esm(tiny(dtype="bfloat16", remat=remat, attention="cudnn"))
        graphdef, state = nnx.split(model)
        loss = lambda state: nnx.merge(graphdef, state).forward(tokens, segments=segments)[0].sum()  # noqa: E731
        text = str(jax.make_jaxpr(jax.grad(loss))(state))
        return text.count("dot_product_attention_fwd"), text.count(" dot_general[")

    kept, again, none = count("products_saveable"), count("nothing_saveable"), count("none")
    assert kept == none and again[0] == 2 * kept[0] and again[1] > kept[1]
