"""Taps: what is recorded, what edits do, at every point of dense, split and trained-expert models."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmodels
from jaxmodels import DecoderConfig, Taps, UserError
from jaxmodels.decoder.model import POINTS
from jaxmodels.experts.models import ffn_layers
from jaxmodels.hub.models import leaves
from tests.tiny_models import EXPERT, close, random_model

B, T, L, D = 2, 7, 3, 32
DENSE = DecoderConfig.tiny(mlp_bias=True)
ROUTED = ("split, routed", "experts")


@pytest.fixture(scope="module")
def models():
    dense = random_model(DENSE)
    split, _ = jaxmodels.split(dense, expert_size=12, method="random")
    routed, _ = jaxmodels.split(dense, expert_size=12, method="random", router="similarity", top_k=2)
    return {"dense": dense, "split": split, "split, routed": routed, "experts": random_model(EXPERT)}


@pytest.fixture(params=["dense", "split", "split, routed", "experts"])
def case(request, models):
    """(model, the points it has)."""
    return models[request.param], POINTS if request.param in ROUTED else POINTS[:-1]


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 97, (B, T)).astype(np.int32)


def shapes(model):
    """The value that each point shows in one layer."""
    cfg = model.cfg
    hidden = (cfg.experts.num_experts, cfg.ffn_widths[0]) if cfg.experts else (cfg.ffn_widths[0],)
    heads = {"query": (B, T, 4, 8), "key": (B, T, 2, 8), "value": (B, T, 2, 8), "probability": (B, 4, T, T),
             "output": (B, T, D)}
    return {"embedding": (B, T, D), "residual": (B, T, D), "ffn.output": (B, T, D),
            **{f"attention.{name}": shape for name, shape in heads.items()},
            **{f"ffn.{name}": (B, T, *hidden) for name in ("gate", "up", "hidden")},
            "router.logits": (B, T, hidden[0])}


def lead(point):
    return {"embedding": (), "residual": (L + 1,)}.get(point, (L,))


def neutral(model, points):
    """Edits of every kind at every point that change nothing; float32 scale and add, bool mask."""
    full = {p: (*lead(p), *shapes(model)[p]) for p in points}
    return {"scale": {p: np.ones(s, np.float32) for p, s in full.items()},
            "add": {p: np.zeros(s, np.float32) for p, s in full.items()},
            "mask": {p: np.ones(s, bool) for p, s in full.items()}}


def numpy_dict(aux):
    return {name: np.asarray(value) for name, value in aux.items()}


def test_recording_changes_nothing(case, tokens):
    model, points = case
    plain, nothing = model(tokens)
    logits, aux = model(tokens, taps=Taps(record=points))
    close(logits, plain)
    assert nothing == {} and set(aux) == set(points)
    for point in points:
        assert aux[point].shape == (*lead(point), *shapes(model)[point]), point


def test_every_edit_at_every_point(case, tokens):
    """One program; then, point by point, an edit in layer 1: the recording is the edited value, earlier layers and
    earlier points are untouched to the bit, the logits move."""
    model, points = case
    base = neutral(model, points)
    plain = np.asarray(model(tokens)[0])

    def run(kind=None, point=None, array=None):
        edits = base if kind is None else base | {kind: base[kind] | {point: array}}
        logits, aux = model(tokens, taps=Taps(record=points, **edits))
        return np.asarray(logits), numpy_dict(aux)

    logits, clean = run()
    close(logits, plain)
    rng = np.random.default_rng(1)
    for point in points:
        at = (1,) if lead(point) else ()
        for kind in ("scale", "add", "mask"):
            array = base[kind][point].copy()
            change = rng.normal(size=array[at].shape).astype(np.float32) if kind != "mask" else rng.random(
                array[at].shape) < 0.5
            array[at] = change
            edited, aux = run(kind, point, array)
            value = clean[point][at]
            expected = {"scale": value * change, "add": value + change, "mask": np.where(change, value, 0)}[kind]
            assert np.array_equal(aux[point][at], expected), (point, kind)
            assert np.abs(edited - logits).max() > 1e-3 * logits.std(), (point, kind)
            if at:
                for other in points:
                    if lead(other):
                        assert np.array_equal(aux[other][:1], clean[other][:1]), (point, kind, other)


@pytest.mark.long
def test_an_edit_of_an_expert_that_does_not_run(models, tokens):
    """Experts that a token does not use read as zero, and adding to their neurons cannot reach its output."""
    for name in ROUTED:
        model = models[name]
        logits, aux = model(tokens, taps=Taps(record=("ffn.hidden", "ffn.up")))
        on = np.asarray(aux["ffn.hidden"] != 0).any(-1)
        assert (on.sum(-1) == 2).all() and (np.asarray(aux["ffn.up"] != 0).any(-1) == on).all()
        shift = np.where(on, 0.0, 3.0)[..., None].astype(np.float32)
        close(model(tokens, taps=Taps(add={"ffn.hidden": shift}))[0], logits)


def test_reductions_fold_inside_the_scan(case, tokens):
    """fn(value, token_mask), any pytree of results, and per-layer arrays through Partial."""
    model, points = case
    mask = np.ones((B, T), bool)
    mask[1, :3] = False
    weight = np.arange(1.0, L + 1, dtype=np.float32)

    def total(value, token_mask):
        assert token_mask.shape == (B, T)
        return {"sum": value.sum(), "count": token_mask.sum()}

    def weighted(weight, value, token_mask):
        return weight * jnp.where(token_mask[..., None], value, 0).sum((0, 1))

    recorded = numpy_dict(model(tokens, mask=mask, taps=Taps(record=points))[1])
    reduce = dict.fromkeys(points, total) | {"ffn.output": jax.tree_util.Partial(weighted, weight)}
    logits, aux = model(tokens, mask=mask, taps=Taps(reduce=reduce))
    for point in points:
        if point == "ffn.output":
            expected = weight[:, None] * (recorded[point] * mask[..., None]).sum((1, 2))
            np.testing.assert_allclose(aux[point], expected, rtol=1e-4, atol=1e-4)
        else:
            axes = tuple(range(len(lead(point)), recorded[point].ndim))
            np.testing.assert_allclose(aux[point]["sum"], recorded[point].sum(axes), rtol=1e-3, atol=1e-2)
            assert np.array_equal(aux[point]["count"], np.full(lead(point), mask.sum()))


def test_the_feed_forward_layer_by_hand(models, tokens):
    """ffn.gate, .up, .hidden, .output of every layer, in numpy from what entered it."""
    for name in ("dense", "split"):
        model = models[name]
        aux = numpy_dict(model(tokens, taps=Taps(record=POINTS[:-1]))[1])
        norms = np.asarray(leaves(model)["groups", 0, "ffn_norm", "scale"])
        for layer, ffn in enumerate(ffn_layers(model)):
            w = {key: np.asarray(value, np.float64) for key, value in ffn.items()}
            x = aux["residual"][layer] + aux["attention.output"][layer].astype(np.float64)
            x = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + model.cfg.norm_eps) * norms[layer]
            into = "btd,df->btf" if name == "dense" else "btd,eds->btes"
            gate, up = (np.einsum(into, x, w[n]) + w[f"{n}_bias"] for n in ("gate", "up"))
            hidden = gate / (1 + np.exp(-gate)) * up
            out_of = "btf,fd->btd" if name == "dense" else "btes,esd->btd"
            output = np.einsum(out_of, hidden, w["down"]) + w["down_bias"]
            for point, value in {"gate": gate, "up": up, "hidden": hidden, "output": output}.items():
                np.testing.assert_allclose(aux[f"ffn.{point}"][layer], value, rtol=1e-3, atol=1e-4)


def test_the_residual_stream(models, tokens):
    """L + 1 entries: each is the one before plus what the two sub-layers add; adding to entry l is adding to what
    layer l - 1 puts out; the last entry is what the final norm reads."""
    model = models["dense"]
    points = ("embedding", "residual", "attention.output", "ffn.output")
    aux = numpy_dict(model(tokens, taps=Taps(record=points))[1])
    assert aux["residual"].shape == (L + 1, B, T, D)
    assert np.array_equal(aux["residual"][0], aux["embedding"])
    close(aux["residual"][1:], aux["residual"][:-1] + aux["attention.output"] + aux["ffn.output"])
    rng = np.random.default_rng(2)
    shift = rng.normal(size=(L + 1, 1, T, D)).astype(np.float32)
    by_residual = model(tokens, taps=Taps(add={"residual": shift}))[0]
    by_output = model(tokens, taps=Taps(add={"embedding": shift[0], "ffn.output": shift[1:]}))[0]
    close(by_residual, by_output)
    assert np.abs(np.asarray(by_residual) - np.asarray(model(tokens)[0])).max() > 0.1


def test_attention_probabilities(case, tokens):
    model, _ = case
    p = np.asarray(model(tokens, taps=Taps(record=("attention.probability",)))[1]["attention.probability"])
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
    assert (p >= 0).all() and (np.triu(p, 1) == 0).all() and (np.tril(p)[..., -1, :] > 0).all()


@pytest.mark.long
def test_edits_under_jit_grad_and_vmap(models, tokens):
    model = models["dense"]
    graphdef, state = nnx.split(model)

    def score(scale):
        logits, _, _ = nnx.merge(graphdef, state).forward(tokens, taps=Taps(scale={"ffn.hidden": scale}))
        return jax.nn.logsumexp(logits[:, -1]).sum()

    one = jnp.ones((L, 1, 1, 48))
    gradient = jax.jit(jax.grad(score))(one)
    many = jnp.stack([one, one.at[1, ..., 5].set(1.01), one.at[1, ..., 5].set(0.99), one.at[2].set(0.0)])
    scores = jax.jit(jax.vmap(score))(many)
    np.testing.assert_allclose((scores[1] - scores[2]) / 0.02, gradient[1, 0, 0, 5], rtol=0.02, atol=2e-4)
    for row, value in zip(many, scores, strict=True):
        logits, _ = model(tokens, taps=Taps(scale={"ffn.hidden": row}))
        np.testing.assert_allclose(jax.nn.logsumexp(logits[:, -1]).sum(), value, rtol=1e-5)
    assert abs(float(scores[3] - scores[0])) > 1e-3
    # Recordings are outputs of the same program.
    assert gradient.shape == one.shape and float(jnp.abs(gradient).max()) > 0


def test_leading_axes_and_scalars(models, tokens):
    """An edit for all layers: a number, or a leading axis of 1; record takes any iterable."""
    short = {"ffn.output": 0.5, "ffn.up": np.float32(0.7), "attention.output": np.full((1,), 0.6, np.float32),
             "ffn.gate": np.full((1, 1, 1, 1), 0.8, np.float32)}
    full = {point: np.full((L, B, T, shapes(models["dense"])[point][-1]), np.ravel(value)[0], np.float32)
            for point, value in short.items()}
    logits, aux = models["dense"](tokens, taps=Taps(record=["embedding"], scale=short))
    close(logits, models["dense"](tokens, taps=Taps(scale=full))[0])
    assert set(aux) == {"embedding"}


def test_unused_taps_cost_nothing(models, tokens):
    """The program without taps is the program with empty ones, and recording adds no product."""
    graphdef, state = nnx.split(models["dense"])

    def text(*taps):
        kwargs = {"taps": taps[0]} if taps else {}
        return str(jax.make_jaxpr(lambda s: nnx.merge(graphdef, s).forward(tokens, **kwargs)[:2])(state))

    def products(jaxpr):
        return len(re.findall(r"\bdot_general\b", jaxpr))

    plain = text()
    assert text(Taps()) == plain and text(Taps(record=[], reduce={}, scale={}, add={}, mask={})) == plain
    recorded = text(Taps(record=("ffn.hidden",)))
    assert recorded != plain and products(recorded) == products(plain) >= 9


def test_layers_of_unequal_width(models, tokens):
    """Pruned layers record zero-padded to the widest, with ffn.width beside; one edit array covers all of them."""
    keep = np.zeros((L, 48), bool)
    for layer, width in enumerate((20, 48, 9)):
        keep[layer, :width] = True
    model = jaxmodels.prune(models["dense"], keep)
    assert model.cfg.ffn_widths == (20, 48, 9)
    mask = np.ones((L, 1, 1, 48), bool)
    mask[0, ..., 10:], mask[1, ..., 5:], mask[2, ..., 3:] = False, False, False
    taps = Taps(record=("ffn.hidden", "ffn.output"), mask={"ffn.hidden": mask},
                reduce={"ffn.up": lambda v, m: v.sum((0, 1))})
    products = model(tokens, taps=Taps(reduce={"ffn.hidden": lambda v, m: jnp.einsum("btf,btg->fg", v, v)}))[1]
    assert products["ffn.hidden"].shape == (L, 48, 48)  # padded along both axes
    assert not np.asarray(products["ffn.hidden"])[2, 9:].any()
    logits, aux = model(tokens, taps=taps)
    assert aux["ffn.width"].tolist() == [20, 48, 9] and aux["ffn.up"].shape == (L, 48)
    assert aux["ffn.hidden"].shape == (L, B, T, 48)
    used = (np.asarray(aux["ffn.hidden"]) != 0).any((1, 2))
    assert [row.tolist() for row in used] == [[True] * n + [False] * (48 - n) for n in (10, 5, 3)]
    close(logits, models["dense"](tokens, taps=Taps(mask={"ffn.hidden": mask}))[0])


def test_dense_layers_among_expert_layers(tokens):
    mixed = random_model(dataclasses.replace(EXPERT, ffn_widths=(12, 48, 12), expert_layers=(True, False, True)))
    logits, aux = mixed(tokens, taps=Taps(record=("ffn.output", "router.logits")))
    close(logits, mixed(tokens)[0])
    assert aux["router.logits"].shape == (L, B, T, 5)
    assert np.asarray(aux["router.logits"] != 0).any((1, 2, 3)).tolist() == [True, False, True]
    for taps in (Taps(record=("ffn.hidden",)), Taps(mask={"ffn.gate": True}), Taps(reduce={"ffn.up": jnp.sum})):
        with pytest.raises(UserError, match="dense layers .* expert layers"):
            mixed(tokens, taps=taps)


@pytest.mark.parametrize("taps, words", [
    ({"record": ("ffn.hiden",)}, "'ffn.hiden' .* did you mean 'ffn.hidden'"),
    ({"add": {"attention.keys": 1.0}}, "did you mean 'attention.key'"),
    ({"reduce": {"zzz": jnp.sum}}, "'zzz' is not a point .* it has embedding, residual"),
    ({"record": ("router.logits",)}, "'router.logits' is not a point"),
    ({"scale": {"ffn.output": np.ones((2, 1, 1, D))}}, "2 layers, the model has 3"),
    ({"mask": {"residual": np.ones((L, 1, 1, D), bool)}}, "3 layers, the model has 4"),
    ({"mask": {"ffn.hidden": np.ones((L, 1, 1, 47), bool)}}, r"\[L, 1, 1, 47\].*\[L, 2, 7, 48\]"),
    ({"add": {"embedding": np.ones((3, T, D))}}, r"\[3, 7, 32\].*\[2, 7, 32\]"),
    ({"add": {"ffn.output": np.ones((L, 3, B, T, D))}}, r"\[L, 3, 2, 7, 32\]"),
])  # fmt: skip
def test_wrong_taps(models, tokens, taps, words):
    with pytest.raises(UserError, match=words) as caught:
        models["dense"](tokens, taps=Taps(**taps))
    assert "\n" not in str(caught.value)


def test_more_wrong_taps(models, tokens):
    with pytest.raises(UserError, match="is a string"):
        Taps(record="ffn.hidden")
    # A mask of neurons does not fit a split model, whose hidden axis is [E, s].
    with pytest.raises(UserError, match=r"\[L, 2, 7, 4, 12\]"):
        models["split"](tokens, taps=Taps(mask={"ffn.hidden": np.ones((L, 1, 1, 48), bool)}))
    norms = jax.tree_util.Partial(lambda a, v, m: v.sum(), np.ones(2))
    with pytest.raises(UserError, match=r"reduce\['ffn.up'\] has 2 layers"):
        models["dense"](tokens, taps=Taps(reduce={"ffn.up": norms}))
