"""Knowledge neurons: statistics, selection, masks, places; and the whole study, tiny."""

import gzip
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmodels
from analysis.attribution import SITES, class_probability, integrated_gradients
from analysis.knowledge_neurons import claims, keep, motifs, report, scores, selection, study, tables, where
from analysis.knowledge_neurons.methods import BUDGETS, METHODS, SCORED, controls
from analysis.knowledge_neurons.neurons import POINTS, Layout, chosen
from jaxmodels.errors import Interrupted, UserError
from jaxmodels.esm.config import EsmConfig
from jaxmodels.esm.model import Esm
from jaxmodels.taps import Taps
from train import enzyme, metrics, protein_pretrain
from train.runtime.config import resolve, to_dict
from train.runtime.mesh import make_mesh
from train.runtime.run_folder import RunFolder
from train.runtime.signals import stop
from train.settings import MeshConfig

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture(scope="module")
def model():
    cfg = EsmConfig(d_model=16, num_heads=2, ffn_widths=(64,) * 2, classes=3, lm_head=False, contact_head=False)
    return Esm(cfg, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def layout(model):
    return Layout.of(model.cfg)


@pytest.fixture(scope="module")
def proteins():
    r = np.random.default_rng(0)
    return ["".join(r.choice(list(RESIDUES), n)) for n in (5, 9, 14, 3, 11, 20, 7)]


@pytest.fixture(scope="module")
def batches(proteins):
    return scores.batches_of(proteins, 24, 48)  # two rows of 24 tokens: four batches, the last filled up


# Neurons


def test_a_vector_of_neurons_and_its_arrays(layout):
    assert layout.size == 9 * 16 * 2 and layout.widths == (16, 16, 16, 16, 64, 16)
    vector = np.arange(layout.size)
    arrays = layout.arrays(vector)
    assert arrays["attention.key"].shape == (2, 1, 1, 2, 8) and arrays["ffn.hidden"].shape == (2, 1, 1, 64)
    back = layout.flat({p: a[:, 0, 0] for p, a in arrays.items()})
    assert (back == vector).all()
    assert (layout.cell[arrays["ffn.hidden"][1].ravel()] == 4 * 2 + 1).all()
    assert layout.counts(np.ones(layout.size, bool)).tolist() == layout.sizes.tolist()
    with pytest.raises(UserError, match="unequal widths"):
        Layout.of(EsmConfig(d_model=16, num_heads=2, ffn_widths=(64, 32)))
    with pytest.raises(UserError, match="one number for each"):
        layout.arrays(vector[1:])


def test_ranks_within_site_and_layer(layout):
    r = np.random.default_rng(0)
    values = r.exponential(size=layout.size) * 10.0 ** (layout.cell % 5)
    quantiles, scaled = layout.quantiles(values), layout.scaled(values)
    for cell in range(12):
        inside = layout.cell == cell
        assert sorted(quantiles[inside]) == pytest.approx((np.arange(inside.sum()) + 0.5) / inside.sum())
        assert (np.argsort(quantiles[inside]) == np.argsort(values[inside])).all()
        assert scaled[inside].mean() == pytest.approx(1)
    # what the report says of quantiles: they keep the same share everywhere
    kept = layout.counts(selection.top(quantiles, 0.25)) / layout.sizes
    np.testing.assert_allclose(kept, 0.25, atol=1 / 16)


def test_pairs_are_summed_and_nothing_else_changes(layout):
    r = np.random.default_rng(0)
    values = r.normal(size=(3, layout.size))
    found = layout.arrays(layout.pair_summed(values)[1])
    before = layout.arrays(values[1])
    for name in ("q", "k"):
        a, b = before[SITES[name]][:, 0, 0], found[SITES[name]][:, 0, 0]
        np.testing.assert_allclose(b[..., :4], (a[..., :4] + a[..., 4:]) / 2)
        np.testing.assert_allclose(b[..., :4], b[..., 4:])
    for name in ("v", "o", "fc1", "fc2"):
        assert (before[SITES[name]] == found[SITES[name]]).all()


def test_the_first_examples_of_every_class():
    assert chosen([2, 0, 2, 2, 1, 0, 0], 2).tolist() == [0, 1, 2, 4, 5]
    assert chosen([2, 0, 2], None).tolist() == [0, 1, 2]


# Activations


def test_streamed_statistics_are_those_of_numpy(model, layout, proteins, batches):
    group = np.array([0, 3, 1, 3, 0, 5, -1])  # classes 0, 1, 2 in two halves; 2 and 4 have nobody; -1 is in none
    found = scores.activation_moments(model, layout, batches, group, 6)
    tokens = {g: [] for g in range(6)}
    for i, protein in enumerate(proteins):
        row = scores.batches_of([protein], 24, 24)[0].tokens
        aux = model(row, output="none", taps=Taps(record=POINTS))[1]
        if group[i] >= 0:
            tokens[group[i]].append(layout.flat(aux, lead=2)[0, :len(protein) + 2].astype(np.float64))
    for g in range(6):
        if not tokens[g]:
            assert found.count[g] == 0 and not found.mean[g].any()
            continue
        a = np.concatenate(tokens[g])
        assert found.count[g] == len(a)
        for got, want in ((found.mean, a.mean(0)), (found.variance, a.var(0)), (found.absolute, np.abs(a).mean(0))):
            np.testing.assert_allclose(got[g], want, rtol=2e-4, atol=2e-6)
    every = np.concatenate([a for parts in tokens.values() for a in parts])
    whole = found.join(range(6))
    assert whole.count == len(every)
    np.testing.assert_allclose(whole.variance, every.var(0), rtol=2e-4, atol=2e-6)
    told = scores.activation_scores(found, 3)
    np.testing.assert_allclose(told["raw"], np.abs(every).mean(0), rtol=2e-4)
    np.testing.assert_allclose(told["rms"], np.sqrt((every ** 2).mean(0)), rtol=2e-4)
    contrasts = []
    for c in range(3):
        inside, outside = (np.concatenate([a for g in range(6) if (g % 3 == c) is own for a in tokens[g]])
                           for own in (True, False))
        pooled = np.sqrt((len(inside) * inside.var(0) + len(outside) * outside.var(0)) / len(every))
        contrasts.append(np.abs(inside.mean(0) - outside.mean(0)) / pooled)
    np.testing.assert_allclose(told["contrast"], np.mean(contrasts, 0), rtol=2e-3, atol=1e-4)


def test_a_small_variance_beside_a_large_mean_survives():
    """E[x²] - E[x]² in float32 would give 0 or worse."""
    r = np.random.default_rng(0)
    value = (1000 + 0.01 * r.normal(size=(2, 50, 8))).astype(np.float32)
    found = np.asarray(scores._fold(jnp.ones((1, 2)), jnp.asarray(value), jnp.ones((2, 50), bool)))
    np.testing.assert_allclose(found[1, 0], value.astype(np.float64).var((0, 1)), rtol=0.05)


# Contributions


@pytest.mark.long
def test_contributions_are_summed_by_group_and_go_on(model, layout, batches):
    labels, group = np.array([0, 1, 2, 0, 1, 2, 0]), np.array([0, 1, 2, 3, 4, 5, 3])
    kept = []
    whole = scores.attribute(model, layout, batches, labels, group, 6, steps=4, max_steps=4, after=kept.append)
    # as stored after the second batch
    half = scores.attribute(model, layout, batches[:2], labels, group, 6, steps=4, max_steps=4)
    again = scores.attribute(model, layout, batches, labels, group, 6, steps=4, max_steps=4, before=half)
    assert len(kept) == len(batches) == 4 and (again.signed == whole.signed).all() and again.done == 4
    assert whole.count.tolist() == [1, 1, 1, 2, 1, 1]
    alone = []
    for batch in batches:
        found = integrated_gradients(
            model, batch.tokens, point=POINTS, steps=4, max_steps=4, mode="gate", tokens="sum",
            target=class_probability(batch.fill(labels)), options={"output": "class"})
        rows = layout.flat(found.values, 1)
        alone += [rows[row] for row, i in enumerate(batch.index) if group[i] == 3]
    assert len(alone) == 2
    np.testing.assert_allclose(whole.signed[3], sum(alone), atol=1e-7)
    np.testing.assert_allclose(whole.absolute[3], np.abs(alone).sum(0), atol=1e-6)
    inner = scores.attribute(model, layout, batches, labels, group, 6, steps=4, max_steps=4, counted="residues")
    ends = [integrated_gradients(model, batch.tokens, point=POINTS, steps=4, max_steps=4, mode="gate", tokens="each",
                                 target=class_probability(batch.fill(labels)), options={"output": "class"})
            for batch in batches]
    for batch, found in zip(batches, ends, strict=True):
        values = layout.flat(found.values, 2)
        for row, i in enumerate(batch.index):
            if group[i] == 0:  # one protein alone
                inside = scores.residues(model, batch.tokens)[row]
                assert inside.sum() == (batch.tokens[row] != model.cfg.pad_id).sum() - 2
                np.testing.assert_allclose(inner.signed[0], values[row, inside].sum(0), atol=1e-6)
    assert np.abs(inner.signed - whole.signed).max() > 1e-5
    by_class = whole.of_classes(3)
    np.testing.assert_allclose(by_class[0], (whole.signed[0] + whole.signed[3]) / 3)
    np.testing.assert_allclose(whole.of_classes(3, halves=[1])[0], whole.signed[3] / 2)
    by_class[1] = np.nan
    np.testing.assert_allclose(scores.task_score(by_class), np.abs(by_class[[0, 2]]).mean(0))
    with pytest.raises(UserError, match="classified correctly"):
        scores.task_score(by_class[[1]])


@pytest.mark.long
def test_totals_over_queries_and_keys_are_equal(model, layout, batches):
    """Zero queries and zero keys give the same uniform attention: what the report must say of "keys are special"."""
    found = scores.attribute(model, layout, batches[:1], np.zeros(7, int), np.zeros(7, int), 2, mode="site", steps=16,
                             max_steps=16)
    totals = np.bincount(layout.cell, weights=found.signed[0]).reshape(6, 2)
    np.testing.assert_allclose(totals[0], totals[1], atol=2e-6)
    assert np.abs(totals[0]).max() > 1e-5


# Selection


@pytest.fixture(scope="module")
def scored(layout):
    r = np.random.default_rng(1)
    return {name: r.exponential(size=layout.size) * (1 + 3 * (layout.cell // 2 == 1)) for name in SCORED}


@pytest.mark.parametrize("method", METHODS)
def test_a_selection_has_as_many_neurons_as_its_share_and_grows(method, layout, scored):
    before = np.zeros(layout.size, bool)
    for share in BUDGETS:
        kept = selection.select(method, share, scored, layout, seed=3)
        assert kept.sum() == max(round(share * layout.size), 1) and not (before & ~kept).any()
        before = kept
    assert kept.all()


def test_what_methods_select(layout, scored):
    best = selection.select("ig_gate", 0.1, scored, layout)
    assert scored["ig_gate"][best].min() >= scored["ig_gate"][~best].max()
    worst = selection.select("bottom", 0.1, scored, layout)
    assert scored["ig_gate"][worst].max() <= scored["ig_gate"][~worst].min()
    drawn = [selection.select("random_matched", 0.1, scored, layout, seed) for seed in (0, 1)]
    assert all((layout.counts(one) == layout.counts(best)).all() for one in drawn)
    assert (drawn[0] != drawn[1]).any() and (drawn[0] != best).any()
    random = [selection.select("random", 0.1, scored, layout, seed) for seed in (0, 1)]
    assert (random[0] != random[1]).any() and (layout.counts(random[0]) != layout.counts(best)).any()
    ties = np.stack([selection.top(np.ones(layout.size), 0.5, seed) for seed in range(40)])
    assert ties.mean(0).min() > 0.2 and ties.mean(0).max() < 0.8  # not the first ones every time


@pytest.mark.parametrize("method", ["random", "ig_gate"])
def test_a_share_of_one_site_leaves_the_others_whole(method, layout, scored):
    kept = selection.within(method, 0.25, 4, scored, layout, seed=1)
    assert layout.counts(kept).sum(1).tolist() == [32, 32, 32, 32, 32, 32]  # fc1 has 128, the others 32
    if method == "ig_gate":
        inside = layout.cell // 2 == 4
        assert scored[method][inside & kept].min() >= scored[method][inside & ~kept].max()


def test_what_cannot_be_selected(layout, scored):
    for share in (0, 1.5):
        with pytest.raises(UserError, match="above 0"):
            selection.top(np.ones(4), share)
    with pytest.raises(UserError, match="not numbers"):
        selection.top(np.array([1.0, np.nan]), 0.5)
    with pytest.raises(UserError, match="not one of"):
        selection.select("best", 0.1, scored, layout)
    with pytest.raises(UserError, match="needs the scores 'ig_gate'"):
        selection.select("bottom", 0.1, {}, layout)


# Keeping


def test_masks_of_ones_and_of_zeros(model, layout, batches):
    keeper = keep.Keeper(model, layout, batches)
    everything, nothing = np.ones(layout.size, bool), np.zeros(layout.size, bool)
    plain = np.zeros((7, 3), np.float32)
    for batch in batches:
        plain[batch.index] = np.asarray(model(batch.tokens, output="class")[0])[:len(batch.index)]
    r = np.random.default_rng(0)
    full = keeper.logits(everything, value=r.normal(size=layout.size))
    assert (full.view(np.uint32) == plain.view(np.uint32)).all()
    off = {p: np.zeros((1, 1, 1, 1), bool) if a.ndim == 4 else np.zeros((1, 1, 1, 1, 1), bool)
           for p, a in layout.arrays(nothing).items()}
    patched = np.asarray(model(batches[0].tokens, output="class", taps=Taps(mask=off))[0])
    np.testing.assert_allclose(keeper.logits(nothing)[batches[0].index], patched[:len(batches[0].index)], atol=1e-6)
    # docs/taps.md's form of the same: h·c + (1 - c)·r
    some, value = r.random(layout.size) < 0.5, r.normal(size=layout.size).astype(np.float32)
    taps = Taps(scale=layout.arrays(some.astype(np.float32)), add=layout.arrays(np.where(some, 0, value)))
    want = np.asarray(model(batches[0].tokens, output="class", taps=taps)[0])
    np.testing.assert_allclose(keeper.logits(some, value)[batches[0].index], want[:len(batches[0].index)], atol=1e-5)


def test_one_program_serves_all_masks(model, layout, batches):
    keeper = keep.Keeper(model, layout, batches)
    keeper.classes(np.ones(layout.size, bool))
    before = keep._logits._cache_size()
    r = np.random.default_rng(0)
    for _ in range(3):
        keeper.classes(r.random(layout.size) < 0.5, r.normal(size=layout.size))
    assert keep._logits._cache_size() == before


def test_areas_and_smallest_shares():
    shares = (0.01, 0.1, 1.0)
    assert keep.log_area(shares, [0.3, 0.3, 0.3]) == pytest.approx(0.3)
    assert keep.log_area(shares, [0.0, 0.5, 1.0]) == pytest.approx(0.5)
    assert keep.log_area((0.1, 1.0), [[0, 1], [1, 1]]).tolist() == pytest.approx([0.5, 1])
    with pytest.raises(UserError, match="rise"):
        keep.log_area((0.1, 0.1), [0, 1])
    assert keep.smallest_enough(shares, [0.1, 0.96, 1.0], 1.0) == 0.1
    assert keep.smallest_enough(shares, [0.99, 0.5, 1.0], 1.0) == 1.0  # the first was luck
    assert keep.smallest_enough(shares, [0, 0, 0.9], 1.0) is None


def test_the_interval_of_an_area_is_that_of_resampling():
    r = np.random.default_rng(0)
    truth, shares = r.integers(0, 3, 60), (0.01, 0.1, 1.0)
    good = np.where(r.random((2, 3, 60)) < 0.8, truth, r.integers(0, 3, (2, 3, 60))).astype(np.int8)
    poor = r.integers(0, 3, (3, 60)).astype(np.int8)
    drawn = [keep.log_area(shares, keep.bootstrap_f1(truth, a.reshape(-1, 3, 60), 3, 400)).mean(1)
             for a in (good, poor)]
    value, low, high = keep.interval(drawn[0] - drawn[1])

    def area(i, answers):
        f1 = keep.scores_of(truth[i], answers.reshape(-1, 3, 60)[..., i], 3)["macro_f1"]
        return keep.log_area(shares, f1).mean()

    def difference(i):
        return area(i, good) - area(i, poor)

    assert value == pytest.approx(difference(np.arange(60)), abs=1e-5) and low > 0
    plain = [difference(r.integers(0, 60, 60)) for _ in range(200)]
    np.testing.assert_allclose((low, high), np.quantile(plain, (0.025, 0.975)), atol=0.04)
    recall = keep.scores_of(truth, poor, 3)["recall"]
    assert recall.shape == (3, 3) and recall[0, 0] == pytest.approx((poor[0] == 0)[truth == 0].mean())
    drawn = keep.bootstrap_recall(truth, poor, 3, 200)
    np.testing.assert_allclose(drawn[0], recall)
    assert metrics.bootstrap(metrics.confusion(truth, poor[0].astype(int), 3), 4000)["recall"][:, 0] == pytest.approx(
        keep.interval(drawn[:, 0, 0])[1:], abs=0.05)


# Places


def test_planted_neurons_are_found_where_they_are(layout):
    values = np.random.default_rng(0).random(layout.size)
    values[layout.cell == 2 + 1] += 1  # k of layer 1: 16 of 288
    found = where.enrichment(selection.top(values, 16 / layout.size), layout)
    assert found["cell"].density[1, 1] == 1 and found["cell"].value[1, 1] == pytest.approx(288 / 16)
    assert found["site"].value[1] == pytest.approx(9) and found["layer"].value.tolist() == pytest.approx([0, 2])
    assert found["site"].value[1] > found["site"].high[1] and found["site"].value[0] < found["site"].low[0] + 1e-9
    with pytest.raises(UserError, match="no neuron"):
        where.enrichment(np.zeros(layout.size, bool), layout)


def test_intervals_of_random_scores_hold_one_and_the_found_values(layout):
    inside, one = [], []
    for seed in range(60):
        kept = selection.top(np.random.default_rng([seed, 7]).random(layout.size), 0.3)
        found = where.enrichment(kept, layout, draws=200, seed=seed)["site"]
        inside.append((found.low <= found.value) & (found.value <= found.high))
        one.append((found.low <= 1) & (found.high >= 1))
    assert np.mean(one) == 1 and 0.9 < np.mean(inside) <= 1


def test_agreement_in_closed_form():
    a = np.arange(200.0)
    assert where.agreement(a, 2 * a) == pytest.approx((1, 1)) and where.agreement(a, -a) == pytest.approx((-1, 0))
    assert np.isnan(where.spearman(a, np.ones(200)))
    assert where.jaccard(np.array([1, 1, 0], bool), np.array([0, 1, 1], bool)) == pytest.approx(1 / 3)
    assert np.isnan(where.jaccard(np.zeros(3, bool), np.zeros(3, bool)))
    rows = where.overlaps({"a": a, "b": a, "c": -a})
    assert [(row["first"], row["second"]) for row in rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert rows[0]["spearman"] == pytest.approx(1)


# Motifs


def test_a_planted_motif_is_found_and_chance_is_not():
    assert motifs.inside("AGASAGASGA", "G.S.G").tolist() == [False] + [True] * 5 + [False] * 4
    assert motifs.inside("GASAGASAG", "G.S.G").all()  # matches that overlap
    r = np.random.default_rng(0)
    sequences = ["".join(r.choice(list(RESIDUES), 60)) + "GASAG" + "".join(r.choice(list("GSA"), 20)) for _ in range(8)]
    values = [r.normal(size=len(sequence)) for sequence in sequences]
    chance = motifs.permuted(sequences, values, "G.S.G", 500)
    assert 0.01 < (chance.values[1:] >= chance.values[0]).mean() < 0.99
    planted = [value + 2 * motifs.inside(sequence, "G.S.G") for sequence, value in zip(sequences, values, strict=True)]
    found = motifs.permuted(sequences, planted, "G.S.G", 500)
    assert found.values[0] > found.values[1:].max() and found.matches >= 8 * 5
    # A site that is high wherever a residue is of the type says nothing about the motif.
    typical = [np.array([letter == "G" for letter in sequence], float) for sequence in sequences]
    alike = motifs.permuted(sequences, typical, "G.S.G", 50).values
    np.testing.assert_allclose(alike, alike[0])
    rows = motifs.rows_of({"serine hydrolase.proteins": np.array(3), "nucleotide binding.proteins": np.array(8),
                           **{f"nucleotide binding.{key}": value for key, value in found._asdict().items()}}, 1)
    assert "not decidable: 3" in rows[0]["verdict"] and rows[1]["p"] == pytest.approx(1 / 501)
    assert rows[1]["effect"] > 1 and rows[1]["verdict"] == "more than elsewhere"


# What can be said


def sign(values, direction):
    return [value if direction == "keep" else -value for value in values]


def table(area=(0.1, 0.05, 0.2), keys=2.0, weak=False, each=None, least=None, none=0.06, scaled=0.6, overrides=()):
    """Tables with a difference of areas, an enrichment of k and a classifier that works or not."""
    cfg = resolve("esm_knowledge_neurons", list(overrides))
    rows = [{"ablation": ablation, "direction": direction, "method": method, "control": control,
             **dict(zip(("difference", "low", "high"), sign(area, direction), strict=True)),
             "each": sign(each or area[:1] * 3, direction)}
            for ablation in ("zero", "mean") for direction in ("keep", "drop") for method in ("activation", "ig_gate")
            for control in controls(method)]
    places = [{"kind": "site", "site": "k", "ranking": ranking, "share": share, "enrichment": keys,
               "least": least or keys, "most": keys, "high": 1.3}
              for ranking in claims.JUDGES for share in cfg.where.shares]
    return cfg, {"full": {"macro_f1": 0.5, "macro_f1_low": 0.05 if weak else 0.4, "commonest_macro_f1": 0.08,
                          "none_zero_macro_f1": 0.02, "none_mean_macro_f1": none},
                 "differences": rows, "where": places, "reliability": [
                     {"ranking": name, "spearman": value, "jaccard": 0.4, "each": [value, value + 0.05]}
                     for name, value in (("ig_gate", 0.9), ("ig_gate_scaled", scaled))],
                 "specificity": {name: {"gap": 0.1, "low": -0.1, "high": 0.3, "each": [0.1], "classes": [5, 6]}
                                 for name in ("zero", "mean")}}


def verdicts(*arguments, **options):
    return {row["name"]: row["verdict"] for row in claims.statements(*table(*arguments, **options))}


def test_verdicts_follow_the_intervals():
    good = verdicts()
    assert good["keep.ig_gate.random_matched"] == good["drop.ig_gate.random"] == claims.YES
    assert good["keep.activation.random_matched_activation"] == claims.YES
    assert good["specific"] == claims.OPEN and good["reliable"] == claims.YES
    assert verdicts((-0.1, -0.2, -0.05))["keep.activation.random"] == claims.NO
    assert verdicts((0.1, -0.05, 0.2))["keep.activation.random"] == claims.OPEN


def test_scores_that_agree_only_by_the_scale_of_their_sites_are_not_reliable():
    assert verdicts(scaled=0.3)["reliable"] == claims.NO and verdicts(scaled=0.47)["reliable"] == claims.OPEN


def test_one_fine_tuning_or_few_masks_decide_nothing():
    alone = verdicts(overrides=("seeds=1", "keep.seeds=9"))
    assert {verdict for name, verdict in alone.items() if name != "reliable"} == {claims.OPEN}
    few = verdicts(overrides=("seeds=2", "keep.seeds=2"))
    assert few["keep.ig_gate.random"] == claims.OPEN and few["keys"] == claims.YES


def test_enough_and_needed_are_told_apart():
    def told(keep, drop):
        rows = [{"name": f"{direction}.{method}.{control}", "verdict": verdict}
                for direction, verdict in (("keep", keep), ("drop", drop))
                for method in ("activation", "ig_gate") for control in controls(method)]
        found = claims.both(rows)
        assert len(found) == 4
        return found[0]["together"]

    assert told(claims.YES, claims.YES) == "enough and needed" and told(claims.YES, claims.NO) == "enough, not needed"
    assert told(claims.NO, claims.NO) == "neither" and "not decidable" in told(claims.YES, claims.OPEN)


def test_a_claim_holds_in_every_fine_tuning_or_is_open():
    assert verdicts(each=(0.2, 0.2, -0.1))["keep.ig_gate.random"] == claims.OPEN
    assert verdicts((-0.1, -0.2, -0.05), each=(-0.2, -0.3, 0.2))["drop.ig_gate.random"] == claims.OPEN


def test_a_fine_tuning_that_cannot_tell_a_class_from_others_leaves_it_open():
    cfg, found = table()
    every = {name: one | {"low": 0.05, "each": [0.1] * 3} for name, one in found["specificity"].items()}
    alone = {name: one | {"each": [0.1]} for name, one in every.items()}
    assert claims.judged_specificity(cfg, {"specificity": every})[0] == claims.YES
    assert claims.judged_specificity(cfg, {"specificity": alone})[0] == claims.OPEN


def test_the_rankings_that_can_tell_judge_keys_in_every_fine_tuning():
    assert verdicts(keys=1.1)["keys"] == claims.NO and verdicts(keys=2.0, least=1.2)["keys"] == claims.OPEN
    row = next(row for row in claims.statements(*table()) if row["name"] == "keys")
    assert row["verdict"] == claims.YES and "by construction" in row["why"]


def test_a_weak_classifier_decides_nothing_about_behaviour():
    found = verdicts(weak=True)
    assert {v for name, v in found.items() if name != "reliable"} == {claims.OPEN} and found["reliable"] == claims.YES
    assert verdicts(none=0.45) == found  # nor where the model is no better than without its neurons


def test_the_weakness_of_a_class_less_recall():
    cfg = resolve("esm_knowledge_neurons", ["keep.bootstrap=50"])
    truth = np.repeat(np.arange(7), 10)
    answers = np.tile(truth, (7, 1)).astype(np.int8)
    for c in range(6):
        answers[c, truth == c] = (c + 1) % 7  # its own class is lost, no other
    answers[6] = -1
    one = tables.specificity(cfg, truth, np.stack([truth] * 2), {"mean": np.stack([answers] * 2)})["mean"]
    change = np.array(one["change"])
    assert (np.diag(change)[:6] == -1).all() and np.isnan(change[6]).all() and one["gap"] == one["low"] == 1
    assert one["each"] == [1, 1] and one["classes"] == [6, 6]
    assert np.abs(change[:6] - np.diag(np.diag(change))[:6]).max() == 0


def test_a_loss_that_is_the_same_for_all_is_not_specific():
    """Three classes have scores, the others the model never names: their recall of 0 cannot fall."""
    cfg = resolve("esm_knowledge_neurons", ["keep.bootstrap=200"])
    truth = np.repeat(np.arange(7), 10)
    full = np.where(truth < 3, truth, 0).astype(np.int8)
    answers = np.full((7, 70), -1, np.int8)
    lost = np.arange(70) % 2 == 0
    answers[:3] = np.where(lost & (truth < 3), (truth + 1) % 3, full)  # half of each class, whosever neurons are lost
    one = tables.specificity(cfg, truth, full[None], {"zero": answers[None]})["zero"]
    assert [one["gap"], one["low"], one["high"]] == pytest.approx([0] * 3, abs=1e-9) and one["classes"] == [3]
    answers[1:] = -1
    assert tables.specificity(cfg, truth, full[None], {"zero": answers[None]}) == {}  # no other class to compare with


def test_random_masks_are_drawn_anew_too():
    cfg = resolve("esm_knowledge_neurons", ["keep.bootstrap=400"])
    truth = np.repeat(np.arange(7), 30)
    wrong = np.where(np.arange(210) % 2 == 0, truth, (truth + 1) % 7)
    same, unlike = (np.array(masks, np.int8)[None, :, None] for masks in ([truth, truth], [truth, wrong]))
    assert tables.resampled(cfg, truth, same).std() == 0  # all right, whatever is drawn
    drawn = tables.resampled(cfg, truth, unlike)[:, 0, 0]
    f1 = [float(keep.scores_of(truth, answers, 7)["macro_f1"]) for answers in unlike[0, :, 0]]
    assert drawn[0] == pytest.approx(np.mean(f1))
    assert drawn[1:].std() > 0.8 * (f1[0] - f1[1]) / 2 / np.sqrt(2)  # of two drawn masks


def test_halves_are_compared_by_the_classes_of_both():
    sums = scores.Attributed.empty(6, 4)._replace(count=np.array([1., 1, 0, 1, 0, 1]), signed=np.ones((6, 4)))
    assert np.isnan(sums.of_classes(3, [0])).any(1).tolist() == [False, True, True]
    assert np.isnan(sums.of_classes(3, [1])).any(1).tolist() == [False, True, True]
    assert np.isnan(sums.of_classes(3)).any(1).tolist() == [False, False, False]


# The whole study, tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Enzymes of seven kinds, told by their composition: (FASTA file, table)."""
    folder, r = tmp_path_factory.mktemp("enzymes"), np.random.default_rng(0)
    rows = []
    for i in range(210):
        kind, part = i % 7, ("train", "train", "train", "valid", "test")[i // 7 % 5]
        odds = np.ones(20)
        odds[2 * kind:2 * kind + 3] = 12
        rows.append((f"P{i}", f"{kind + 1}.1.1.1", part, "".join(
            r.choice(list(RESIDUES), r.integers(20, 60), p=odds / odds.sum()))))
    fasta, file = folder / "proteins.fasta", folder / "enzyme_ec.tsv.gz"
    fasta.write_text("".join(f">{name}\n{sequence}\n" for name, _, _, sequence in rows))
    with gzip.open(file, "wt") as out:
        out.write("id\tec\tsplit\tsequence\n" + "".join("\t".join(row) + "\n" for row in rows))
    return fasta, file


def study_of(source, out, *overrides):
    """On one device: eight simulated ones share a core, and cost minutes."""
    cfg = resolve("esm_knowledge_neurons", [
        "preset=tiny", f"enzyme.data.source=enzyme_ec:{source[1]}", f"pretrain.data.source=path:{source[0]}",
        "pretrain.data.limit=none", "enzyme.data.limit=none", "where.motif_proteins=8",
        "enzyme.loop.steps=24", "enzyme.loop.evaluate_every=24", "enzyme.optimizer.learning_rate=0.01", *overrides])
    with RunFolder.open("study", to_dict(cfg), out, operational=cfg.operational) as folder, \
            pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not the recorded version")
        for module in (enzyme, protein_pretrain):
            patch.setattr(module, "make_mesh", lambda mesh: make_mesh(MeshConfig(data=1), jax.devices()[:1]))
        study.run(cfg, folder)
    return json.loads((out / "results.json").read_text())


GATE = ("score.modes=gate",
        "keep.methods=random,random_matched,random_matched_activation,bottom,activation,ig_gate")


@pytest.fixture(scope="module")
def tuned(source, tmp_path_factory):
    """Random encoders whose heads were fitted in closed form: classifiers that work, without a training to compile."""
    with pytest.warns(UserWarning, match="not the recorded version"):
        parts, _ = enzyme.read_parts(resolve("esm_enzyme", [f"data.source=enzyme_ec:{source[1]}"]))
    folders = [tmp_path_factory.mktemp("tuned") for _ in range(2)]
    for seed, folder in enumerate(folders):
        jaxmodels.save(fitted(parts["train"], seed), folder / "model")
    return f"tuned={folders[0]},{folders[1]}"


def fitted(train, seed):
    from sklearn.linear_model import LogisticRegression

    cfg = EsmConfig(d_model=32, num_heads=2, ffn_widths=(128,) * 2, classes=7, lm_head=False, contact_head=False)
    encoder, pooled = Esm(cfg, rngs=nnx.Rngs(seed)), np.zeros((len(train), 32), np.float32)
    head = encoder.classifier
    for batch in scores.batches_of(train.sequences, 64, 1024):
        hidden = np.asarray(encoder(batch.tokens, output="hidden")[0])
        inside = (batch.tokens != cfg.pad_id) & (batch.tokens != cfg.cls_id) & (batch.tokens != cfg.eos_id)
        mean = np.einsum("btd,bt->bd", hidden, inside) / inside.sum(1, keepdims=True)
        found = np.tanh(mean @ np.asarray(head.dense[...]) + np.asarray(head.dense_bias[...]))
        pooled[batch.index] = found[:len(batch.index)]
    fit = LogisticRegression(C=1e3, max_iter=2000).fit(pooled, train.labels)
    head.out[...], head.out_bias[...] = jnp.asarray(fit.coef_.T, jnp.float32), jnp.asarray(fit.intercept_, jnp.float32)
    return encoder


def settled(results):
    """What depends on neither the clock nor what the process did before."""
    return {key: value for key, value in results.items() if "second" not in key and "peak" not in key}


@pytest.fixture(scope="module")
def finished(source, tuned, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    return study_of(source, out, tuned, *GATE), out


@pytest.mark.long
def test_the_study_answers_every_claim(finished):
    results, out = finished
    assert results["status"] == "complete" and results["neurons"] == 9 * 32 * 2 and results["seed1.scored_classes"] == 7
    assert results["full.macro_f1_low"] > results["full.commonest_macro_f1"]  # or nothing could be decided
    found = {key: value for key, value in results.items() if key.startswith("claim.")}
    assert len(found) == 11 and set(found.values()) <= {claims.YES, claims.NO, claims.OPEN}
    told = json.loads((out / "tables.json").read_text())
    assert len(told["curves"]) == 2 * (6 + 5) * 3  # what controls from below lose is not asked
    assert len(told["by_share"]) == 2 * 2 * 2 * 2 * 2 and len(told["both"]) == 4
    assert {len(row["each"]) for row in told["differences"] + told["reliability"]} == {2}
    assert len(told["sites"]) == 2 * 3 * 6 * 2 and len(told["motifs"]) == 2 * len(motifs.MOTIFS)
    assert told["sequences"] and all(len(row["values"]) == len(row["residues"]) for row in told["sequences"])
    assert [row["method"] for row in told["retrained"]] == ["ig_gate", "activation", "random", "random_matched"]
    drawn = next(row for row in told["curves"] if row["method"] == "random")
    assert drawn["masks"] == 4 and drawn["sd"] is not None
    whole = [row["macro_f1"] for row in told["curves"] if row["direction"] == "keep" and row["share"] == 1]
    assert whole == pytest.approx([results["full.macro_f1"]] * 12)
    quantile = [row["enrichment"] for row in told["where"]
                if row["ranking"] == "activation_quantile" and row["kind"] == "site" and row["share"] == 0.1]
    assert len(quantile) == 6 and quantile == pytest.approx([1] * 6, abs=0.15)  # whole neurons of 32
    page = report.build(out).read_text()
    for words in ("Queries and keys have equal totals", "The protocol is ours", "enrichment-ig_gate",
                  "curves-drop"):
        assert words in page


@pytest.mark.long
def test_a_study_goes_on_where_it_stopped(finished, source, tuned, tmp_path, monkeypatch):
    """Stopped while scoring, and again while keeping."""
    results, whole = finished
    out = tmp_path / "halves"
    for last in ("seed0/scores/gate-zero.npz", "seed1/curves/zero-keep-bottom.npz"):
        save = RunFolder.save_npz

        def signal(self, name, save=save, last=last, **arrays):
            save(self, name, **arrays)
            if f"{name}.npz" == last:
                stop.requested = "SIGTERM"

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(RunFolder, "save_npz", signal)
            try:
                study_of(source, out, tuned, *GATE)
            finally:
                stop.requested = None
        assert (out / last).exists() and not (out / "tables.json").exists()
    assert report.build(out).exists()  # of an interrupted study too
    again = study_of(source, out, tuned, *GATE)
    assert settled(again) == settled(results)
    assert json.loads((out / "tables.json").read_text()) == json.loads((whole / "tables.json").read_text())


@pytest.mark.long
@pytest.mark.soak
def test_the_tiny_preset_with_all_stages_and_paths(source, tmp_path):
    results = study_of(source, tmp_path / "out", "pretrain.data.batch=4", "pretrain.data.validation_rows=4")
    assert results["status"] == "complete" and (tmp_path / "out" / "pretrain" / "report.html").exists()
    told = json.loads((tmp_path / "out" / "tables.json").read_text())
    zero = [row for row in told["totals"] if row["baseline"] == "zero"]
    assert len(zero) == 2
    for row in zero:
        assert row["q"] == pytest.approx(row["k"], abs=max(0.1 * abs(row["q"]), 1e-5))
    assert {row["ranking"] for row in told["where"]} >= {*claims.JUDGES, "ig_conductance"}
    assert any({row["first"], row["second"]} == {"ig_gate", "ig_conductance"} for row in told["overlap"])
    assert "seed0.completeness_error_worst.site-mean" in results
    assert "seed0.completeness_error_mean.conductance-zero" not in results
    page = report.build(tmp_path / "out").read_text()
    for words in ("The classifier beside its floors", "most similar known sequence", "every fine-tuning",
                  "jaxmodels bench attribution", "After an epoch of retraining"):
        assert words in page


@pytest.mark.parametrize(("override", "message"), [
    ("keep.methods=random,activation,ig_gate,best", "has 'best'"), ("keep.methods=random", "lacks 'activation'"),
    ("keep.shares=0.5,0.1,1", "must rise"), ("keep.shares=0.1,0.5", "end with 1"), ("where.shares=0", "above 0"),
    ("score.modes=site", "must hold gate"), ("score.modes=gate", "ig_site"), ("score.site_examples=1", "at least 2"),
    ("enzyme.pretrained=runs/x", "set pretrained"), ("where.draws=0", "draws=0"),
    ("seeds=0", "seeds=0"), ("keep.site_shares=2", "at most 1"), ("where.permutations=0", "permutations=0")])
def test_what_a_study_cannot_be_told(override, message):
    with pytest.raises(UserError, match=message):
        resolve("esm_knowledge_neurons", [override])


def test_what_is_not_an_enzyme_classifier(model, tmp_path):
    jaxmodels.save(model, tmp_path / "model")
    with pytest.raises(UserError, match="7 classes"):
        study.classifier(resolve("esm_knowledge_neurons", [f"tuned={tmp_path}"]), None, 0, "here")
    (tmp_path / "results.json").write_text('{"setting": "easy"}')  # near_eval: homologs of the test part
    with pytest.raises(UserError, match="easy setting"):
        study.classifier(resolve("esm_knowledge_neurons", [f"tuned={tmp_path}"]), None, 0, "here")
