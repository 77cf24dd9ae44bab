"""The benchmark of ESM at a toy size: every side does the same work, and rows say what they must."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import esm
from benchmarks._timing import Samples
from jaxmodels.errors import UserError
from jaxmodels.esm.alphabet import CLS, EOS, MASK, PAD
from jaxmodels.esm.config import EsmConfig

TINY = EsmConfig.tiny(ffn_widths=(128,) * 2)  # 4 D, which esm2quinox has
HAS_EQUINOX = all(map(importlib.util.find_spec, esm.NEEDS["esm2quinox"]))


def proteins(*lengths: int) -> list[np.ndarray]:
    """Ids of random proteins of so many residues."""
    rng = np.random.default_rng(0)
    return [np.concatenate([[CLS], rng.integers(4, 24, n), [EOS]]).astype(np.int32) for n in lengths]


def questions(side: list[esm.Batch]) -> list[tuple]:
    """Every protein of a side as (tokens, targets), sorted."""
    found = []
    for tokens, segments, targets in side:
        segments = (tokens != PAD).astype(np.int32) if segments is None else segments
        for row in zip(tokens, segments, targets, strict=True):
            found += [tuple(part[row[1] == i].tolist() for part in row[::2]) for i in range(1, row[1].max() + 1)]
    return sorted(found)


def test_sides_ask_the_same():
    """Every protein once in every side, with the same residues hidden; padding is no question."""
    pieces = proteins(30, 500, 126, 127, 1022, 7, 80)
    sides = esm.batches(pieces, 3)
    packed, padded, bucketed = map(questions, sides.values())
    assert list(sides) == ["packed", "padded", "bucketed"] and packed == padded == bucketed and len(packed) == 7
    assert all(max(targets) >= 4 for _, targets in packed) and any(MASK in tokens for tokens, _ in packed)
    for side in sides.values():
        for tokens, _, targets in side:
            assert tokens.shape == targets.shape and (targets[(tokens == PAD)] == -1).all()
    assert [one[0].shape for one in sides["packed"]] == [(2, 1024)]
    assert sorted(one[0].shape for one in sides["bucketed"]) == [(1, 256), (1, 512), (1, 1024), (4, 128)]
    assert [len(one[0]) for one in sides["padded"]] == [3, 3, 1]


def test_sample(monkeypatch):
    """At equal steps of the order by length; all there are, when more are asked for."""
    from train.data.proteins import Protein, Proteins

    made = [Protein(str(n), "A" * n) for n in (5, 3, 1, 4, 2, 5)]  # the last one is there already
    monkeypatch.setattr(esm, "protein_source", lambda name: Proteins(made, {}))
    assert [len(ids) - 2 for ids in esm.sample(9)] == [1, 2, 3, 4, 5]
    assert [len(ids) - 2 for ids in esm.sample(2)] == [2, 4]
    made.append(Protein("long", "L" * 1023))
    assert [len(ids) - 2 for ids in esm.sample(9)] == [1, 2, 3, 4, 5, 511, 512]


def test_rows():
    fast, slow = Samples([1.0, 2.0, 3.0], [0.0] * 3), Samples([3.0, 3.0, 3.0], [0.0] * 3)
    first, second = esm.compare("forward", fast, {"transformers": slow, "esm2quinox": fast}, 60)
    assert (first["ours"], first["theirs"], first["ratio"], first["result"]) == (30, 20, 1.5, "met")
    assert second["bar"] is None and second["result"] is None and second["ratio"] == 1
    (missed,) = esm.compare("packed, forward", fast, {"padded": slow}, 60)
    assert (missed["bar"], missed["result"]) == (1.6, "missed")
    (alone,) = esm.compare("forward", fast, {}, 60)
    assert alone["ours"] == 30 and "ratio" not in alone


def test_other_results_are_an_error():
    ours = (np.float32(3.0), np.array([[1.0, -2.0]]))
    near = esm.differences("both", {"jaxmodels": ours, "near": (ours[0] + 1e-5, ours[1] + 1e-4)})
    assert list(near) == ["near"] and max(near["near"]) < 1
    for other in ((ours[0] + 1e-3, ours[1]), (ours[0], ours[1] + 1e-2), (np.float32(np.nan), ours[1])):
        with pytest.raises(RuntimeError, match="other is .* did not do the same work"):
            esm.differences("both", {"jaxmodels": ours, "other": other})


@pytest.mark.long
def test_packed_rows():
    rows = esm.packed_beside_padded(TINY, proteins(30, 60), 2, 1)
    assert [(row["what"], row["beside"]) for row in rows] == [
        (f"packed, {passed}", name) for passed in esm.PASSES for name in ("padded", "bucketed")]
    for row in rows:
        assert row["residues"] == 90 and row["ours"] > 0 and row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
        assert set(row["padding"]) == {"packed", "padded", "bucketed"}


def test_without_peers_or_proteins(tmp_path, monkeypatch, capsys):
    """The whole command: it tells what is not here, and measures the rest."""
    def nothing(count: int) -> None:
        raise UserError("no such data here")

    monkeypatch.setattr(esm, "SIDES", {"jaxmodels": esm.ours})
    monkeypatch.setattr(esm, "PEERS", ("no such peer",))
    monkeypatch.setattr(esm, "sample", nothing)
    esm.main(str(tmp_path / "out.json"), config=TINY, batch=2, length=9, repeats=(1, 1, 1))
    told = capsys.readouterr().out
    assert "no such peer is not installed" in told and "not measured: no such data here" in told
    content = json.loads((tmp_path / "out.json").read_text())
    assert [row["what"] for row in content["rows"]] == list(esm.PASSES) and content["about"]["versions"]["jax"]


@pytest.mark.long
@pytest.mark.torch
def test_beside_the_peers(tmp_path, monkeypatch, capsys):
    """Logits, loss and gradient agree with every peer that is here, and the table has their rows."""
    monkeypatch.setattr(esm, "sample", lambda count: proteins(*range(10, 10 + count)))
    esm.main(str(tmp_path / "out.json"), config=TINY, packed_config=TINY, batch=2, length=20, proteins=3,
             repeats=(1, 1, 1))
    told = capsys.readouterr().out
    assert all(column in told for column in esm.COLUMNS)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    peers = ["transformers", *["esm2quinox"] * HAS_EQUINOX]
    assert [row["beside"] for row in rows] == [*peers, *peers, *("padded", "bucketed") * 2]
    assert all(max(apart) <= 1 for row in rows[:2] for apart in row["differences"].values())
    assert [row["bar"] for row in rows if row["bar"]] == [1.0, 1.6, 1.6]
    assert all(row["result"] in ("met", "missed") for row in rows if row["bar"])
