"""Classes of enzymes: objectives, scores, floors; both protein experiments, tiny, end to end and interrupted."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmodels
from jaxmodels.errors import Interrupted, UserError
from jaxmodels.esm.config import EsmConfig
from jaxmodels.esm.model import Esm
from tests.interrupted import signal_at
from train import enzyme, enzyme_floors, enzyme_transfer, metrics, protein_pretrain
from train.data.proteins import Protein
from train.objectives.classify import Classify, ClassifyTerms, class_weights, term_weights
from train.optimizers import layerwise, scaled
from train.runtime.config import resolve, to_dict
from train.runtime.mesh import make_mesh
from train.runtime.run_folder import RunFolder
from train.runtime.state import split
from train.settings import MeshConfig

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


class Fixed:
    """A model that gives the logits it was told."""

    def __init__(self, logits):
        self.logits = logits

    def forward(self, tokens, mask=None, segments=None, output="logits", num_segments=None):
        assert output == "class" and num_segments == self.logits.shape[1]
        return self.logits, {}


def test_the_softmax_loss_is_that_of_numpy():
    r = np.random.default_rng(0)
    logits, targets = r.normal(size=(3, 4, 7)).astype(np.float32), r.integers(-1, 7, (3, 4)).astype(np.int32)
    weights = tuple(r.uniform(0.5, 2, 7))
    batch = {"tokens": jnp.zeros((3, 9), int), "segments": jnp.ones((3, 9), int), "targets": jnp.asarray(targets)}
    loss, sums = Classify(weights).loss(Fixed(jnp.asarray(logits)), batch, None)
    want = sum(weights[t] * (np.log(np.exp(row).sum()) - row[t])
               for row, t in zip(logits.reshape(-1, 7), targets.reshape(-1), strict=True) if t >= 0)
    assert float(loss) == pytest.approx(want, rel=1e-5) and int(sums["weight"]) == (targets >= 0).sum()
    assert int(sums["correct"]) == ((logits.argmax(-1) == targets) & (targets >= 0)).sum()


def test_the_sigmoid_loss_is_that_of_numpy():
    r = np.random.default_rng(0)
    logits = r.normal(size=(2, 3, 5)).astype(np.float32)
    targets, present = (r.random((2, 3, 5)) < 0.4).astype(np.float32), r.random((2, 3)) < 0.7
    batch = {"tokens": jnp.zeros((2, 9), int), "segments": jnp.ones((2, 9), int), "targets": jnp.asarray(targets),
             "present": jnp.asarray(present)}
    weights = (1.0, 2.0, 0.5, 1.0, 3.0)
    loss, sums = ClassifyTerms(weights).loss(Fixed(jnp.asarray(logits)), batch, None)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    want = -(np.log(p) * targets * weights + np.log(1 - p) * (1 - targets))
    assert float(loss) == pytest.approx(want[present].sum(), rel=1e-5) and int(sums["weight"]) == present.sum()


def test_class_weights():
    labels = np.array([0] * 90 + [1] * 10)
    weights = np.array(class_weights(labels, 3))
    assert weights[1] / weights[0] == pytest.approx(3) and weights[labels].mean() == pytest.approx(1)
    assert np.isfinite(weights).all() and weights[2] == pytest.approx(weights[1] * 10**0.5)
    targets = np.array([[1, 1], [1, 0], [1, 0], [1, 0]])
    assert np.array(term_weights(targets))[1] / term_weights(targets)[0] == pytest.approx(2)


def test_scores_are_those_of_scikit_learn():
    from sklearn.metrics import accuracy_score, f1_score, recall_score

    r = np.random.default_rng(0)
    truth, predicted = r.integers(0, 5, 200), r.integers(0, 6, 200)
    scores = metrics.class_scores(metrics.confusion(truth, predicted, 7))
    assert scores["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert scores["macro_f1"] == pytest.approx(
        f1_score(truth, predicted, labels=range(7), average="macro", zero_division=0))
    np.testing.assert_allclose(scores["recall"][:5], recall_score(truth, predicted, labels=range(5), average=None))
    assert np.isnan(scores["recall"][5:]).all()


def test_the_bootstrap_is_that_of_resampling():
    r = np.random.default_rng(0)
    truth, predicted = r.integers(0, 3, 300), r.integers(0, 3, 300)
    other = np.where(np.arange(len(truth)) % 3 == 0, truth, predicted)
    f1 = [float(metrics.class_scores(metrics.confusion(truth, one, 4))["macro_f1"]) for one in (other, predicted)]
    value, low, high = metrics.macro_f1_difference(truth, other, predicted, 4, 500)
    assert value == pytest.approx(f1[0] - f1[1]) and 0 < low < value < high
    assert metrics.macro_f1_difference(truth, other, other, 4, 100) == (0, 0, 0)
    found = metrics.bootstrap(metrics.confusion(truth, predicted, 4), 4000)
    plain = []
    for _ in range(2000):
        i = r.integers(0, 300, 300)
        plain.append(metrics.class_scores(metrics.confusion(truth[i], predicted[i], 4))["macro_f1"])
    np.testing.assert_allclose(found["macro_f1"], np.quantile(plain, (0.025, 0.975)), atol=0.006)
    p = (truth == predicted).mean()  # binomial
    half = 1.96 * (p * (1 - p) / 300) ** 0.5
    np.testing.assert_allclose(found["accuracy"], (p - half, p + half), atol=0.008)
    assert np.isnan(found["recall"][:, 3]).all() and np.isfinite(found["recall"][:, :3]).all()


def test_a_floor_is_no_transfer_of_whole_numbers():
    from analysis.enzyme_report import transfer_rows

    assert transfer_rows({"strict.test.neighbour.macro_f1": 0.2}) == []
    assert transfer_rows({"strict.care_30.neighbour.macro_f1": 0.2, "strict.care_30.neighbour.level_4": 0.1}) == [
        {"setting": "strict", "set": "care_30", "nearest by": "words", "level_4": 0.1}]


def test_accuracy_by_levels_of_ec_numbers():
    truth = [("1.2.3.4",), ("2.7.1.1", "2.7.1.2"), ("3.1.-.-",), ("4.1.1.1",)]
    guess = ["1.2.3.5", "2.7.1.2", "3.1.1.1", "5.1.1.1"]
    assert [metrics.ec_accuracy(truth, guess, level) for level in (4, 3, 2, 1)] == [0.25, 0.5, 0.75, 0.75]
    assert metrics.ec_accuracy([("1.1.1.-",)], ["1.1.1.-"], 4) == 0  # "somewhere below" agrees with nothing
    with pytest.raises(ValueError, match="level 5"):
        metrics.ec_accuracy(truth, guess, 5)


def test_fmax_and_aupr_in_closed_form():
    truth = np.eye(3, 4, dtype=bool)
    assert metrics.fmax(truth, truth.astype(float)) == (1.0, 0.01)
    # one right and one wrong term for each protein, both sure: P = 1/2, R = 1
    both = truth | np.roll(truth, 1, axis=1)
    assert metrics.fmax(truth, both.astype(float))[0] == pytest.approx(2 / 3)
    # a protein without a prediction counts in R and not in P: P = 1, R = 2/3
    silent = np.where([[True], [True], [False]], truth, False)
    assert metrics.fmax(truth, silent.astype(float))[0] == pytest.approx(0.8)
    assert metrics.fmax(truth, 0.5 * truth + 0.4 * np.roll(truth, 1, axis=1)) == (1.0, 0.41)
    unlabelled = np.concatenate([truth, np.zeros((1, 4), bool)])
    assert metrics.fmax(unlabelled, np.ones((4, 4)))[0] == pytest.approx(2 * 0.25 / 1.25)
    assert metrics.macro_aupr(truth, truth.astype(float)) == 1.0  # the term that nobody has is left out
    assert metrics.macro_aupr(truth, np.zeros((3, 4))) == pytest.approx(1 / 3)


@pytest.mark.long
def test_rates_by_layer():
    start = Esm(EsmConfig.tiny(classes=7, contact_head=False, lm_head=False), rngs=nnx.Rngs(0))
    params = split(start)[1]
    scales = layerwise(params, 3, trunk=0.2, decay=0.5)
    assert float(scales["classifier"]["out"]) == 1 and float(scales["norm"]["scale"]) == pytest.approx(0.2)
    assert float(scales["embed"]) == pytest.approx(0.2 / 8)
    layer = scales["groups"][0]["ffn"]["up"]
    np.testing.assert_allclose(np.ravel(layer), [0.05, 0.1, 0.2])
    unrolled = Esm(EsmConfig.tiny(classes=7, contact_head=False, scan_layers=False), rngs=nnx.Rngs(0))
    groups = layerwise(split(unrolled)[1], 3, 0.2, 0.5)["groups"]
    assert [float(np.ravel(groups[i]["ffn"]["up"])[0]) for i in range(3)] == pytest.approx([0.05, 0.1, 0.2])
    import optax

    optimizer = scaled(optax.sgd(1.0), lambda p: layerwise(p, 3, 0.2, 0.5))
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    np.testing.assert_allclose(updates["groups"][0]["ffn"]["up"][0], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["classifier"]["out"], -1)


def test_floors_on_words_that_tell():
    known, labels = ["MKVLAAGG", "WWYYFFHH", "CCCCDDDD"], np.array([0, 3, 3])
    assert enzyme_floors.majority(labels, 2).tolist() == [3, 3]
    best, similar = enzyme_floors.nearest(known, ["AAMKVLAAGG", "FFHH", "MK", "WWYYFFHH"])
    assert best.tolist() == [0, 1, 0, 1] and similar == pytest.approx([5 / 7, 1 / 5, 0, 1])
    features = enzyme_floors.composition(["MKMKX", "M"])
    assert features.shape == (2, 421) and features[0, :20].sum() == pytest.approx(0.8)
    assert features[0, 20:420].sum() == pytest.approx(3 / 4) and features[1, -1] == 0


def test_whole_numbers_by_transfer():
    known = [Protein("a", "MKVLAAGG", ("1.1.1.-", "1.1.1.1")), Protein("b", "WWYYFFHH", ("2.7.1.1",))]
    asked = [Protein("c", "MKVLAAGC", ("1.1.1.1", "1.1.1.-")), Protein("d", "WWYYFFHC", ("2.7.2.1",))]
    like = enzyme_floors.similarity([p.sequence for p in known], [p.sequence for p in asked])
    assert enzyme_transfer.ec_levels(known, asked, like) == {"level_4": 0.5, "level_3": 0.5, "level_2": 1, "level_1": 1}
    # c: P = R = 1; d: its term is unknown: P = 0, R = 0
    assert enzyme_transfer.ec_terms(known, asked, like)["fmax"] == pytest.approx(0.5)
    assert enzyme_transfer.ec_terms(known, asked, like)["aupr"] == pytest.approx((1 + 1 + 0.5) / 3)
    rows = np.random.default_rng(0).normal(size=(5, 8))
    found = enzyme_transfer.cosine(rows, rows)
    assert found.argmax(1).tolist() == list(range(5)) and np.diagonal(found) == pytest.approx(1)
    model = Esm(EsmConfig.tiny(contact_head=False), rngs=nnx.Rngs(0))
    alone = enzyme_transfer.embed(model, ["MKVL"])
    beside = enzyme_transfer.embed(model, ["W" * 120, "MKVL", "M" * 1500])
    np.testing.assert_allclose(beside[1], alone[0], atol=1e-5)


@pytest.mark.long
def test_the_recorded_floors(data_folder):
    """enzyme_ec's SOURCE.md: accuracy / macro-F1 on the 1,753 test chains of one class."""
    if not (data_folder / "enzyme_ec").exists():
        pytest.skip(f"no enzyme_ec in {data_folder}")
    cfg = resolve("esm_enzyme")
    parts, _ = enzyme.read_parts(cfg)
    test = parts["test"]
    recorded = {"strict": {"majority": (0.392, 0.081), "logistic": (0.289, 0.180), "neighbour": (0.375, 0.244)},
                "easy": {"neighbour": (0.465, 0.362)}}
    for setting, floors in recorded.items():
        known = [parts[name] for name in ("train", "valid", *(("near_eval",) if setting == "easy" else ()))]
        found = enzyme_floors.floor_predictions(sum((part.sequences for part in known), ()),
                                                np.concatenate([part.labels for part in known]), test.sequences)
        for name, want in floors.items():
            scores = metrics.class_scores(metrics.confusion(test.labels, found[name], 7))
            got = scores["accuracy"], scores["macro_f1"]
            assert got == pytest.approx(want, abs=1.5e-3), (setting, name)  # neighbours may be equally near


# Both experiments, tiny


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Proteins of seven kinds, told by their composition: (FASTA file, table of enzymes)."""
    folder, r = tmp_path_factory.mktemp("proteins"), np.random.default_rng(0)
    rows = []
    for i in range(210):
        kind = i % 7
        odds = np.ones(20)
        odds[2 * kind:2 * kind + 3] = 8
        sequence = "".join(r.choice(list(RESIDUES), r.integers(20, 160), p=odds / odds.sum()))
        part = ("train", "train", "train", "valid", "near_eval", "test")[i // 7 % 6]
        rows.append((f"P{i}", f"{kind + 1}.1.1.1", part, sequence))
    fasta, table = folder / "proteins.fasta", folder / "enzyme_ec.tsv.gz"
    fasta.write_text("".join(f">{name}\n{sequence}\n" for name, _, _, sequence in rows))
    with gzip.open(table, "wt") as file:
        file.write("id\tec\tsplit\tsequence\n" + "".join("\t".join(row) + "\n" for row in rows))
    return fasta, table


def start(name, run, out, *overrides):
    """On one device: eight simulated ones share a core, and cost minutes."""
    cfg = resolve(name, ["preset=tiny", *overrides])
    with RunFolder.open(name, to_dict(cfg), out, operational=cfg.operational) as folder, pytest.MonkeyPatch.context() \
            as patch:
        for module in (enzyme, protein_pretrain):
            patch.setattr(module, "make_mesh", lambda mesh: make_mesh(MeshConfig(data=1), jax.devices()[:1]))
        run(cfg, folder)
    return json.loads((out / "results.json").read_text())


def stopped(step, *arguments):
    """A run that a signal reaches after `step` is logged."""
    with signal_at(step), pytest.raises(Interrupted):
        start(*arguments)


def logged(out):
    return [{key: value for key, value in json.loads(line).items()
             if key not in ("step_seconds", "tokens_per_second", "mfu")}
            for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out):
    model = jaxmodels.load(out / "model")
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


@pytest.fixture(scope="module")
def pretrained(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrain") / "out"
    overrides = [f"data.source=path:{files[0]}", "data.validation_rows=8", "loop.steps=20", "loop.evaluate_every=10",
                 "loop.save_every=10"]
    return start("esm_pretrain", protein_pretrain.run, out, *overrides), out, overrides


def test_pretraining_tells_floors_and_leaves_a_model(pretrained):
    results, out, _ = pretrained
    assert results["status"] == "complete" and results["steps"] == 20
    assert results["data.train_proteins"] + results["data.validation_proteins"] == 210
    for name in ("unigram", "neighbours"):
        for kind in ("", "hidden_"):
            floor = results[f"floor.{name}_{kind}perplexity"]
            assert 5 < floor < 21
            assert results[f"below_{name}_{kind}nats"] == pytest.approx(
                np.log(floor) - results[f"validation_{kind}loss"])
    assert results["floor.unigram_perplexity"] < results["floor.unigram_hidden_perplexity"]
    model = jaxmodels.load(out / "model")
    assert isinstance(model, Esm) and model.cfg.num_layers == 2
    from analysis.training_report import build

    assert "floor.unigram_perplexity" in build(out).read_text()


def test_questions_of_which_none_is_hidden(files, tmp_path, monkeypatch):
    cfg = resolve("esm_pretrain", ["preset=tiny", f"data.source=path:{files[0]}", "data.validation_rows=8",
                                   "masking.hidden=0"])
    with RunFolder.open("esm_pretrain", to_dict(cfg), tmp_path / "out", operational=cfg.operational) as folder:
        data = protein_pretrain.prepare_data(cfg, folder)
        found = protein_pretrain.floors(cfg, folder, data)
    assert set(found) == {"floor.unigram_perplexity", "floor.neighbours_perplexity"}
    monkeypatch.setattr(protein_pretrain.experiment, "evaluator", lambda *arguments: arguments[-1])
    numbers = protein_pretrain.make_evaluation(cfg, None, cfg.model.encoder(), None, data)
    assert set(numbers(dict.fromkeys(protein_pretrain.SUMS, 0.0) | {"weight": 4.0, "nll": 8.0, "correct": 1.0})) == {
        "validation_loss", "validation_perplexity", "validation_accuracy"}


@pytest.mark.long
def test_pretraining_goes_on_where_it_stopped(pretrained, tmp_path):
    _, whole, overrides = pretrained
    out = tmp_path / "halves"
    stopped(13, "esm_pretrain", protein_pretrain.run, out, *overrides)
    assert json.loads((out / "results.json").read_text())["status"] == "interrupted"
    assert start("esm_pretrain", protein_pretrain.run, out, *overrides)["status"] == "complete"
    assert logged(out) == logged(whole)
    assert all((a == b).all() for a, b in zip(weights(out), weights(whole), strict=True))


@pytest.fixture(scope="module")
def tuned(files, pretrained, tmp_path_factory):
    out = tmp_path_factory.mktemp("enzyme") / "out"
    overrides = [f"data.source=enzyme_ec:{files[1]}", f"pretrained={pretrained[1]}", "data.limit=none", "loop.steps=18",
                 "loop.evaluate_every=6", "optimizer.learning_rate=0.01", "tune.trunk=0.5"]
    with pytest.warns(UserWarning, match="not the recorded version"):
        return start("esm_enzyme", enzyme.run, out, *overrides), out, overrides


def test_fine_tuning_tells_the_model_beside_every_floor(tuned):
    results, out, _ = tuned
    assert results["status"] == "complete" and results["train_proteins"] == 105
    for method in ("model", *enzyme_floors.NAMES):
        at = f"strict.test.{method}."
        assert results[f"{at}macro_f1_low"] <= results[f"{at}macro_f1"] <= results[f"{at}macro_f1_high"]
        assert {f"{at}recall_{c}" for c in range(1, 8)} <= results.keys()
    assert results["strict.test.majority.accuracy"] == pytest.approx(1 / 7)
    assert results["strict.test.logistic.accuracy"] > 0.5  # composition tells all
    scores = {line["step"]: line["validation_macro_f1"] for line in logged(out) if "validation_macro_f1" in line}
    assert scores[results["chosen_step"]] == max(scores.values()) == results["validation_macro_f1"]
    model = jaxmodels.load(out / "model")
    assert model.cfg.classes == 7 and model.cfg.pool == "mean"
    from analysis.enzyme_report import build

    page = build(out).read_text()
    assert "composition, logistic regression" in page and "encoder beside its floors" in page
    assert "by 95 % intervals of the differences" in page
    less = results["strict.test.model_less_majority.macro_f1"]
    assert less == pytest.approx(results["strict.test.model.macro_f1"] - results["strict.test.majority.macro_f1"])


def test_proteins_that_have_changed(files, tmp_path, monkeypatch):
    """A run that has begun refuses them, and rows of the old ones serve no other run."""
    made, table = [], tmp_path / "enzyme_ec.tsv.gz"
    lines = gzip.decompress(files[1].read_bytes()).decode().splitlines(keepends=True)

    def prepares(cfg, stage, parts, setting, mesh):
        made.append(enzyme.prepare_data(cfg, stage, parts["train"], setting))
        raise Interrupted("stopped")

    monkeypatch.setattr(enzyme, "fine_tune", prepares)
    overrides = [f"data.source=enzyme_ec:{table}", "pretrained=none"]
    for there, out in ((lines, "out"), (lines[:1] + lines[8:], "other")):
        with gzip.open(table, "wt") as file:
            file.writelines(there)
        with pytest.raises(Interrupted), pytest.warns(UserWarning, match="not the recorded version"):
            start("esm_enzyme", enzyme.run, tmp_path / out, *overrides)
    assert made[0].name != made[1].name
    with pytest.raises(UserError, match="proteins or classes of enzyme_ec:.* have changed"), \
            pytest.warns(UserWarning, match="not the recorded version"):
        start("esm_enzyme", enzyme.run, tmp_path / "out", *overrides)


@pytest.mark.long
def test_fine_tuning_goes_on_where_it_stopped(tuned, tmp_path):
    results, whole, overrides = tuned
    out = tmp_path / "halves"
    with pytest.warns(UserWarning, match="recorded"):
        stopped(8, "esm_enzyme", enzyme.run, out, *overrides)
        again = start("esm_enzyme", enzyme.run, out, *overrides)
    assert logged(out) == logged(whole)
    clock = ("second", "goodput")
    assert {k: v for k, v in again.items() if not any(word in k for word in clock)} == \
        {k: v for k, v in results.items() if not any(word in k for word in clock)}
    assert all((a == b).all() for a, b in zip(weights(out), weights(whole), strict=True))


@pytest.mark.long
def test_training_ends_when_nothing_gets_better(tuned, tmp_path):
    _, _, overrides = tuned
    still = [one for one in overrides if not one.startswith("optimizer")]
    with pytest.warns(UserWarning, match="recorded"):
        results = start("esm_enzyme", enzyme.run, tmp_path / "out", *still, "optimizer.learning_rate=0",
                        "loop.evaluate_every=2", "tune.patience=2")
    assert results["steps"] == 6 and results["chosen_step"] == 2


def test_what_cannot_be_tuned(tmp_path):
    with pytest.raises(UserError, match="settings="):
        resolve("esm_enzyme", ["settings=strict,strict"])
    with pytest.raises(UserError, match="layer_decay"):
        resolve("esm_enzyme", ["tune.layer_decay=0"])
    with pytest.raises(UserError, match="nowhere"):
        enzyme.starting_model(resolve("esm_enzyme", [f"pretrained={tmp_path}/nowhere"]))
