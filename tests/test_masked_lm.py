"""Questions about hidden residues: which, how many, the same after a restart; the loss and the floors beside it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.errors import UserError
from jaxmodels.esm.alphabet import MASK, PAD, STANDARD, encode
from train.data.masking import Masking, MaskingConfig
from train.data.packing import pack_whole
from train.data.pipeline import Batches
from train.objectives.masked_lm import MaskedLanguageModel
from train.protein_floors import Counts, floor_sums

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def rows(count=60, length=128, seed=0, letters=RESIDUES + "XBUZO"):
    r = np.random.default_rng(seed)
    proteins = ["".join(r.choice(list(letters), r.integers(1, length - 2))) for _ in range(count)]
    packed = pack_whole([encode(protein)[0] for protein in proteins], length, PAD)
    return [{name: packed[name][i] for name in ("tokens", "segments")} for i in range(len(packed["tokens"]))]


def batches(source, **settings):
    masking = ("masking", 1, Masking(settings.pop("masking", MaskingConfig())))
    return Batches(source, **{"seed": 3, "global_batch": 8, "random_transforms": (masking,)} | settings)


def stream(one, count):
    return [{name: a.copy() for name, a in batch.items()} for batch in itertools.islice(one, count)]


def equal(left, right):
    return len(left) == len(right) and all((a[name] == b[name]).all() for a, b in zip(left, right, strict=True)
                                           for name in a)


def test_masks_are_the_same_after_a_restart_and_for_any_number_of_processes():
    source = rows()
    everything = stream(batches(source), 20)  # several epochs
    again = batches(source)
    stream(again, 3)
    again.seek(11 * 8)
    assert equal(stream(again, 9), everything[11:])
    for n in (2, 4):
        parts = [stream(batches(source, process_index=p, process_count=n), 6) for p in range(n)]
        for i, whole in enumerate(everything[:6]):
            found = {int(key): t for part in parts for key, t in zip(part[i]["id"], part[i]["tokens"], strict=True)}
            assert all((found[int(key)] == t).all() for key, t in zip(whole["id"], whole["tokens"], strict=True))


def test_masks_change_with_epoch_and_seed_and_not_with_the_batch():
    source = rows()
    one = {}
    for number, batch in enumerate(stream(batches(source, global_batch=1), 2 * len(source))):
        one[number // len(source), int(batch["id"][0])] = batch["targets"][0]
    assert all((one[0, i] != one[1, i]).any() for i in range(len(source)))
    first = stream(batches(source), 1)[0]
    for key, targets in zip(first["id"], first["targets"], strict=True):
        assert (one[0, int(key)] == targets).all()
    other = {int(key): t for batch in stream(batches(source, seed=4, shuffle=False, epochs=1), 9)
             for key, t in zip(batch["id"], batch["targets"], strict=True)}
    assert any((other[i] != one[0, i]).any() for i in other)


def test_only_standard_residues_are_asked_for_and_put_in():
    for row in rows(200):
        masked = Masking(MaskingConfig(share=1.0))(row, np.random.default_rng(0))
        asked = masked["targets"] >= 0
        assert (asked == (np.isin(row["tokens"], STANDARD) & (row["segments"] > 0))).all()
        assert (masked["targets"][asked] == row["tokens"][asked]).all()
        assert (masked["tokens"][~asked] == row["tokens"][~asked]).all()
        assert np.isin(masked["tokens"][asked], [*STANDARD, MASK]).all()
        assert (masked["segments"] == row["segments"]).all() and masked["tokens"].dtype == np.int32


def test_shares_are_exact_in_the_mean_and_within_one_for_every_protein():
    source, cfg = rows(300, letters=RESIDUES), MaskingConfig()
    total = np.zeros(4)
    for i, row in enumerate(source * 4):
        masked = Masking(cfg)(row, np.random.default_rng((1, i)))
        for s in range(1, row["segments"].max() + 1):
            mine = row["segments"] == s
            asked = mine & (masked["targets"] >= 0)
            n, k, hidden = mine.sum() - 2, asked.sum(), (masked["tokens"][asked] == MASK).sum()
            shown = (masked["tokens"][asked] == row["tokens"][asked]).sum()
            assert abs(k - 0.15 * n) < 1 and abs(hidden - 0.12 * n) < 1
            total += n, k, hidden, shown
    n, k, hidden, shown = total
    assert k / n == pytest.approx(0.15, abs=2e-3) and hidden / k == pytest.approx(0.8, abs=5e-3)
    # shown as it is: a tenth, and a twentieth of the replaced tenth
    assert shown / k == pytest.approx(0.1 + 0.1 / 20, abs=8e-3)


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"share": 1.5}, {"hidden": 0.95}, {"replaced": -0.1}])
def test_shares_that_make_no_sense(settings):
    with pytest.raises(UserError, match="masking"):
        MaskingConfig(**settings)


@dataclasses.dataclass
class Fixed:
    """A model that gives logits it was told, and remembers what it was asked."""

    logits: np.ndarray

    def forward(self, tokens, mask=None, segments=None):
        self.asked = tokens, mask, segments
        return jnp.asarray(self.logits), {}


def test_the_loss_is_that_of_numpy():
    r = np.random.default_rng(0)
    source = rows(20, 64)[:4]
    masked = [Masking()(row, np.random.default_rng(i)) for i, row in enumerate(source)]
    batch = {name: np.stack([row[name] for row in masked]) for name in ("tokens", "segments", "targets")}
    model = Fixed(r.normal(size=(4, 64, 33)).astype(np.float32))
    objective = MaskedLanguageModel(MASK)
    loss, sums = objective.loss(model, {name: jnp.asarray(a) for name, a in batch.items()}, jax.random.key(0))
    log_p = model.logits - np.log(np.exp(model.logits.astype(np.float64)).sum(-1, keepdims=True))
    nll, hidden, correct = 0.0, 0.0, 0
    for b, t in zip(*np.nonzero(batch["targets"] >= 0), strict=True):
        one = -log_p[b, t, batch["targets"][b, t]]
        nll += one
        hidden += one * (batch["tokens"][b, t] == MASK)
        correct += model.logits[b, t].argmax() == batch["targets"][b, t]
    assert float(loss) == pytest.approx(nll, rel=1e-5) and float(sums["hidden_nll"]) == pytest.approx(hidden, rel=1e-5)
    assert int(sums["weight"]) == (batch["targets"] >= 0).sum() and int(sums["correct"]) == correct
    assert int(sums["hidden_weight"]) == (batch["tokens"] == MASK).sum()
    metrics = objective.metrics(loss, sums)
    assert float(metrics["perplexity"]) == pytest.approx(np.exp(nll / (batch["targets"] >= 0).sum()), rel=1e-5)
    np.testing.assert_array_equal(model.asked[1], batch["segments"] > 0)
    # what is not asked has no gradient
    gradient = jax.grad(lambda logits: objective.loss(Fixed(logits), batch, None)[0])(jnp.asarray(model.logits))
    assert not np.asarray(gradient)[batch["targets"] < 0].any()
    assert np.asarray(gradient)[batch["targets"] >= 0].any(-1).all()


def test_floors_against_plain_counting():
    """Letters in a cycle: the neighbours tell all; the composition only that ten letters are equally likely."""
    cycle = "ACDEFGHIKL"
    packed = pack_whole([encode((cycle * 14)[i:i + 100])[0] for i in range(40)], 128, PAD)
    counts = Counts()
    counts.add(packed["tokens"], packed["segments"])
    assert counts.table.sum() == 4000
    share = counts.unigram()
    assert share.sum() == pytest.approx(1) and share[np.array(STANDARD) == encode("A", False)[0]] == (400 + 1) / 4020
    assert counts.neighbours().sum(-1) == pytest.approx(1)
    cfg = MaskingConfig()
    masked = [Masking(cfg)({name: packed[name][i] for name in ("tokens", "segments")}, np.random.default_rng(i))
              for i in range(40)]
    batch = {name: np.stack([row[name] for row in masked]) for name in ("tokens", "segments", "targets")}
    sums = floor_sums(counts, batch, cfg)
    hidden = sums["hidden_weight"]
    assert np.exp(sums["unigram_hidden_nll"] / hidden) == pytest.approx(10, rel=0.01)
    assert np.exp(sums["neighbours_hidden_nll"] / hidden) < 2.5
    # a residue that is shown is the true one with (0.1 + 0.1/20) / (0.1 + 0.2/20 ...): by Bayes, plainly
    nll = 0.0
    for b, t in zip(*np.nonzero(batch["targets"] >= 0), strict=True):
        seen, target = batch["tokens"][b, t], batch["targets"][b, t] - STANDARD[0]
        if seen == MASK:
            nll -= np.log(share[target])
            continue
        likely = np.array([0.1 / 20 + 0.1 * (residue == seen) for residue in STANDARD]) * share
        nll -= np.log(likely[target] / likely.sum())
    assert sums["unigram_nll"] == pytest.approx(nll)
    # nobody looks over the end of a protein: single residues have no neighbours
    alone = Counts()
    single = pack_whole([encode(letter)[0] for letter in "ACDE"], 128, PAD)
    alone.add(single["tokens"], single["segments"])
    assert alone.table[20, :, 20].sum() == alone.table.sum() == 4
