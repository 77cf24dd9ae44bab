"""The benchmark of the tagger at a toy size: its sides do the same work, and rows say what they must."""

import json

import numpy as np
import pytest
from flax import nnx

from benchmarks import ner
from benchmarks._timing import Samples
from jaxmodels.cnn_cnn_lstm.config import CnnCnnLstmConfig
from jaxmodels.cnn_cnn_lstm.network import CnnCnnLstm, is_word
from train.data.tagged_rows import tagged_rows
from train.ner_config import NerDataConfig, NerRun
from train.settings import MeshConfig

SIZES = {"char_filters": 8, "d_char": 6, "d_word": 10, "word_filters": 12, "word_width": 3, "d_hidden": 12, "d_tag": 5,
         "chars": 10}
TINY = {"source": None, "limit": 40, "model": SIZES, "batch": 2, "length": 64, "steps": 2, "sample": 10, "passes": 4,
        "repeats": (2, 2, 2)}


def test_made_up_sentences_are_as_long_as_bc5cdrs():
    data = ner.made_up(1000)
    lengths = np.array([len(one) for one in data.parts["test"]])
    assert 24 < lengths.mean() < 31 and lengths.min() >= 2 and 20 <= np.median(lengths) <= 26
    assert {tag for one in data.parts["train"] for tag in one.tags} == {"O", "B-Chemical", "B-Disease"}
    assert ner.made_up(3).parts["train"] == ner.made_up(3).parts["train"] != ner.made_up(3).parts["test"]
    found, told = ner.corpus("path:/no/such/folder", 2)
    assert len(found.parts["test"]) == 2 and told.startswith("made up, /no/such/folder does not exist")


def test_rows():
    def rows(what, reference, words=60_000, **seconds):
        samples = {name.replace("_", ", "): Samples([0.5 * s, s, 2 * s], [0.0] * 3) for name, s in seconds.items()}
        return ner.compare(what, samples, words, reference, 10.0)

    ours, spacy = rows("tagging", "spaCy", jaxmodels=1.0, spaCy=4.0)
    assert (ours["words/s"], ours["ratio"], ours["result"], ours["s"]) == (60_000, 4, "met", 10)
    assert ours["bar"] == ">= 3, >= 30000 words/s" and "ratio" not in spacy and "result" not in spacy
    assert ours["p10"] < ours["s"] < ours["p90"]
    assert rows("tagging", "spaCy", jaxmodels=3.0, spaCy=12.0)[0]["result"] == "missed"  # four times of a slow peer
    assert rows("tagging", "spaCy", jaxmodels=1.0, spaCy=2.5)[0]["result"] == "missed"
    assert rows("tagging", "spaCy", jaxmodels=1.0)[0]["result"] == "open"
    ours, crf, theirs = rows("training", "PyTorch", jaxmodels=2.0, jaxmodels_CRF=3.0, PyTorch=4.0)
    assert (ours["ratio"], ours["result"], crf["ratio"]) == (0.5, "met", 0.75) and "result" not in crf
    _, bald, decoder = rows("scoring", "MNLP", MNLP=0.1, BALD=9.0, BALD_decoder=3.0)
    assert (bald["bar"], bald["result"]) == ("<= 100", "met")
    assert (decoder["bar"], decoder["result"]) == ("<= 25", "missed")


def test_other_work_is_an_error():
    logits = np.ones((2, 3), np.float32)
    assert ner.check_logits(logits, logits + 1e-5) == pytest.approx(1e-5, rel=0.1)
    for other in (logits + 1e-2, logits[:1]):
        with pytest.raises(RuntimeError, match="not ours from the same weights"):
            ner.check_logits(logits, other)


@pytest.mark.long
@pytest.mark.torch
def test_pytorch_computes_what_ours_does():
    """Logits of sentences that share rows; the losses of three steps, without dropout."""
    from benchmarks import _ner_peers

    cfg = NerRun(data=NerDataConfig(source="bc5cdr", batch=2, length=64), mesh=MeshConfig(data=1))
    data = ner.made_up(40)
    sizes = {"dropout": 0.0, "word_drop": 0.0}
    tagger = ner.untrained(cfg, data)
    model = CnnCnnLstm(CnnCnnLstmConfig.tiny(**tagger.vocabulary.sizes, **sizes), rngs=nnx.Rngs(0))
    rows = tagged_rows(data.parts["train"], tagger.vocabulary, 64, model.cfg.reach)
    batches = [{name: array[at:at + 2] for name, array in rows.items()} for at in (0, 2, 4)]
    real = is_word(batches[0]["words"])
    theirs, ours = _ner_peers.Torch(model, batches, cfg.optimizer), ner.Training(cfg, model, batches)
    taken = _ner_peers.tensors(batches[0], model.cfg.tags)
    assert len(taken["places"]) > 2 and (taken["gold"] >= 0).sum() == real.sum()
    first = batches[0]
    logits = np.asarray(model(first["words"], first["chars"], first["tags"])[0])[real]
    np.testing.assert_allclose(theirs.logits(), logits, rtol=1e-4, atol=1e-4)
    for _ in range(2):
        assert theirs() == pytest.approx(ours(), rel=1e-4)


@pytest.mark.long
@pytest.mark.soak
def test_whole_command(tmp_path, monkeypatch, capsys):
    """Without peers their rows tell why they are empty, and the bars against them stay open."""
    monkeypatch.setattr(ner, "PEERS", {"spaCy": "no_such_peer", "PyTorch": "no_such_peer"})
    rows, told = whole_command(tmp_path, capsys)
    assert [(row["what"], row["side"]) for row in rows] == [
        ("tagging", "jaxmodels"), ("tagging", "spaCy"), ("training", "jaxmodels"), ("training", "jaxmodels, CRF"),
        ("training", "PyTorch"), ("scoring", "MNLP"), ("scoring", "BALD"), ("scoring", "BALD, decoder")]
    assert rows[1]["result"] == rows[4]["result"] == "no_such_peer is not installed" and rows[2]["result"] == "open"
    assert rows[6]["passes"] == 4 and rows[6]["ratio"] == pytest.approx(rows[6]["s"] / rows[5]["s"])
    assert rows[2]["steps"] == 2 < rows[2]["epoch_steps"] and "sentences: made up" in told


@pytest.mark.long
@pytest.mark.torch
def test_beside_peers(tmp_path, capsys):
    pytest.importorskip("spacy", reason="spacy is not installed")
    rows, _ = whole_command(tmp_path, capsys)
    found = {(row["what"], row["side"]): row for row in rows}
    assert found["tagging", "jaxmodels"]["ratio"] > 0 < found["tagging", "spaCy"]["words/s"]
    assert found["training", "PyTorch"]["logits_apart"] < 1e-4 and found["training", "jaxmodels"]["ratio"] > 0


def whole_command(tmp_path, capsys):
    ner.main(str(tmp_path / "out.json"), **TINY)
    told = capsys.readouterr().out
    assert all(column in told for column in ner.COLUMNS)
    return json.loads((tmp_path / "out.json").read_text())["rows"], told
