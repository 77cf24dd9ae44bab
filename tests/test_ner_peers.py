"""The peers of the tagger: features, both trained on a few sentences and scored by one scorer, absent packages."""

import json
import sys

import pytest

from jaxmodels.errors import UserError
from tests import tiny_ner
from train import ner_peers
from train.data.conll import Sentence
from train.data.tagged import TaggedTexts
from train.runtime.config import resolve
from train.runtime.run_folder import RunFolder

SHORT = {"max_steps": 40, "eval_frequency": 20}


@pytest.fixture(scope="module")
def source():
    many, few = ([Sentence(tuple(map(str, one.words)), one.tags) for one in tiny_ner.sentences(count, seed)]
                 for count, seed in ((24, 0), (12, 1)))
    return TaggedTexts({"train": many, "dev": many, "test": few}, ("Drug", "Ill"), {})


def installed(*names):
    for name in names:
        if reason := ner_peers.missing(name):
            pytest.skip(reason)


@pytest.mark.parametrize("word, told", [("Cox-2", "Xx-d"), ("NaCl", "XxXx"), ("1,200", "d,d"), ("ß中..", "x.")])
def test_shape(word, told):
    assert ner_peers.shape(word) == told


def test_features_of_a_word_and_its_neighbours():
    (rows,) = ner_peers.features([("Cox-2", "is", "inhibited", ".")])
    assert len(rows) == 4
    first = set(rows[0])
    assert {"bias", "+0:word=cox-2", "+0:shape=Xx-d", "+0:length=5", "+0:first2=Co", "+0:last4=ox-2", "-1:none",
            "-2:none", "+1:word=is", "+2:last3=ted"} <= first
    assert len(first) == 1 + 3 * 9 + 2  # nine of each word that is there
    assert "-2:word=is" in rows[3] and "+1:none" in rows[3]


def test_crf_learns_by_heart(source):
    installed("crf")
    tag = ner_peers.train_crf(source)
    test = source.parts["test"]
    assert tag([one.words for one in test]) == [list(one.tags) for one in test]
    assert tag([]) == []


def test_spacy_learns_by_heart(source):
    installed("spacy")
    tag = ner_peers.train_spacy(source, 0, **SHORT)
    test = source.parts["test"]
    assert tag([one.words for one in test]) == [list(one.tags) for one in test]
    assert tag([("Severe", "pain", "\u4e2d")])[0][:2] == ["B-Ill", "I-Ill"] and tag([]) == []
    assert "tensorflow" not in sys.modules


@pytest.mark.long
def test_the_seed_tells_spacys_weights(source):
    installed("spacy")
    words = [one.words for one in source.parts["test"]]
    first, again, other = (ner_peers.train_spacy(source, seed, max_steps=4, eval_frequency=4)(words)
                           for seed in (0, 0, 1))
    assert first == again != other


def test_scores_land_in_the_results_and_are_kept(source, tmp_path, monkeypatch):
    """Each peer is trained once; what it says is scored as the tagger is."""
    installed("crf")
    with RunFolder.open("ner", {}, tmp_path / "out") as folder:
        found = ner_peers.peer_scores(("crf",), source, 0, folder)
        monkeypatch.setitem(ner_peers.TRAIN, "crf", None)
        assert ner_peers.peer_scores(("crf",), source, 0, folder) == found
    assert found["test.crf.f1"] == found["test.crf.Drug.recall"] == 1 and found["test.crf.words_per_second"] > 0
    assert found.items() <= json.loads((tmp_path / "out" / "results.json").read_text()).items()


def test_what_is_wrong_counts_as_wrong(source, tmp_path, monkeypatch):
    monkeypatch.setattr(ner_peers, "PACKAGES", {"crf": ("json", "json")})
    monkeypatch.setitem(ner_peers.TRAIN, "crf", lambda *_: lambda sentences: [["B-Drug", *["O"] * (len(words) - 1)]
                                                                             for words in sentences])
    with RunFolder.open("ner", {}, tmp_path / "out") as folder:
        found = ner_peers.peer_scores(("crf",), source, 0, folder)
    truth = [one.tags for one in source.parts["test"]]
    right = sum(tags[0] == "B-Drug" for tags in truth)
    assert found["test.crf.precision"] == right / len(truth)
    assert found["test.crf.recall"] == right / sum(tag[0] == "B" for tags in truth for tag in tags)


@pytest.mark.long
def test_the_experiment_trains_them_too(tmp_path, monkeypatch):
    """Their numbers stand beside the tagger's."""
    monkeypatch.setattr(ner_peers, "PACKAGES", {"crf": ("json", "json")})
    monkeypatch.setitem(ner_peers.TRAIN, "crf", lambda *_: lambda sentences: [["O"] * len(one) for one in sentences])
    results = tiny_ner.run(tmp_path / "out", tiny_ner.write(tmp_path), "epochs=1", "least_steps=25", "peers=crf")
    assert results["test.crf.f1"] == 0 < results["test.crf.token_accuracy"] < 1 and "test.f1" in results


def test_an_absent_package_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(ner_peers, "PACKAGES", {"crf": ("no_such_module", "no-such-package")})
    monkeypatch.setattr("train.ner.train", None)
    with pytest.raises(UserError, match="peers=crf: no-such-package is not installed"):
        tiny_ner.run(tmp_path / "out", tiny_ner.write(tmp_path), "peers=crf")
    with pytest.raises(UserError, match="peers"):
        resolve("ner", ["peers=crf,flair"])


def test_absent_packages_are_told(monkeypatch):
    monkeypatch.setattr(ner_peers, "PACKAGES", {"spacy": ("no_such_module", "no-such-package")})
    assert ner_peers.missing("spacy") == "no-such-package is not installed"
    with pytest.raises(UserError, match=r"peers=spacy: no-such-package is not installed; pip install .*peers.*leave"):
        ner_peers.check_peers(("spacy",))
    with pytest.raises(UserError, match="peers=flair is not one of spacy"):
        ner_peers.check_peers(("flair",))
