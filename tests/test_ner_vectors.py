"""Skip-gram vectors from a text: words of one kind are alike, and the experiment keeps what it has trained."""

import importlib.util

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmodels.errors import UserError
from tests.tiny_ner import NAMES, run, write
from train import skipgram
from train.data.word_vectors import PIECES, SPACE, TABLE, TENSOR, wordllama_vectors


def test_words_that_stand_together_are_alike():
    """Eight topics of three words; a word that is rare has no vector."""
    r = np.random.default_rng(0)
    topics = np.array([[f"{letter}{i}" for i in range(3)] for letter in "abcdefgh"])
    text = [list(r.choice(topics[r.integers(8)], 5)) for _ in range(800)]
    text[0] = ["A0", "once", "A1"]
    steps, options = [], {"window": 2, "epochs": 30, "often": 1.0, "rate": 1e-2}
    found = skipgram.skipgram(text, 8, advance=steps.append, **options)
    assert set(found) == set(topics.flat) and found["a0"].shape == (8,)
    assert sum(steps) == skipgram.steps_of(skipgram.frequent(text), 30)
    vectors = np.stack([found[word] / np.linalg.norm(found[word]) for word in topics.flat])
    same = np.arange(24)[:, None] // 3 == np.arange(24) // 3
    cosines = vectors @ vectors.T
    assert cosines[same].min() > cosines[~same].max()
    again = skipgram.skipgram(text, 8, **options)
    assert all(np.array_equal(found[word], again[word]) for word in found)


def test_too_little_text():
    with pytest.raises(UserError, match="1 words occur 3 times or more; give more text"):
        skipgram.skipgram([["a", "b"], ["a"], ["A"]], 4)


@pytest.mark.long
def test_the_experiment_trains_vectors_once(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "more").mkdir()
    options = ("vectors.name=skipgram", f"vectors.texts=path:{write(tmp_path / 'more', 60)}", "epochs=1",
               "least_steps=25")
    data = write(tmp_path / "data", 24)
    results = run(tmp_path / "out", data, *options)
    assert results["data.words_with_vectors"] >= len(NAMES)
    (tmp_path / "out" / "results.json").unlink()
    monkeypatch.setattr(skipgram, "skipgram", None)
    assert run(tmp_path / "out", data, *options)["data.words_with_vectors"] == results["data.words_with_vectors"]


def fake_wordllama(path, rows=9):
    """A package of the same files; that its code is not run is seen by what it would do."""
    from tokenizers import Tokenizer, models, normalizers

    names = ["<unk>", "<0xCE>", SPACE, f"{SPACE}a", "b", "a", f"{SPACE}ab", "c", f"{SPACE}c"]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [(SPACE, "a"), (f"{SPACE}a", "b"),
                                                                                 (SPACE, "c")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Prepend(SPACE)
    for name in (TABLE, PIECES):
        (path / "wordllama" / name).parent.mkdir(parents=True)
    (path / "wordllama" / "__init__.py").write_text("raise SystemExit")
    tokenizer.save(str(path / "wordllama" / PIECES))
    table = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float16)
    save_file({TENSOR: table}, path / "wordllama" / TABLE)
    return table.astype(np.float32)


def test_vectors_of_the_pieces_of_words(tmp_path, monkeypatch):
    """Means of pieces, turned and centred on the known words; what is unknown to the table has none."""
    table = fake_wordllama(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = {"a", "abba", "cab", "\u0436"}  # the last is spelled in nothing that has a meaning
    found = wordllama_vectors(known, 4)
    assert set(found) == {"a", "abba", "cab"} and found["a"].dtype == np.float32
    means = {"a": table[3], "abba": table[[6, 4, 5]].mean(0), "cab": table[[8, 5, 4]].mean(0)}
    for one, other in (("a", "abba"), ("abba", "cab"), ("cab", "a")):
        assert np.linalg.norm(found[one] - found[other]) == pytest.approx(np.linalg.norm(means[one] - means[other]),
                                                                          rel=1e-4)
    np.testing.assert_allclose(sum(found.values()), 0, atol=1e-5)
    short = wordllama_vectors(known, 2)
    assert all(np.array_equal(short[word], found[word][:2]) for word in found)  # the first components
    assert set(wordllama_vectors(known, 2, limit=1)) == {*found, "ab"}
    assert set(wordllama_vectors(known, 2, limit=9)) == {*found, "ab", "c"}
    with pytest.raises(UserError, match="model.d_word=5, the vectors of wordllama have 4; set"):
        wordllama_vectors(known, 5)


@pytest.mark.parametrize("damage, told", [
    (lambda folder: (folder / TABLE).unlink(), f"has no {TABLE}"),
    (lambda folder: (folder / TABLE).write_bytes(b"short"), "shorter than a safetensors header"),
    (lambda folder: (folder / PIECES).write_text("{}"), "is damaged"),
    (lambda folder: save_file({TENSOR: np.zeros((8, 4), np.float16)}, folder / TABLE), "has 8 rows, the tokenizer 9"),
    (lambda folder: save_file({TENSOR: np.full((9, 4), np.nan, np.float16)}, folder / TABLE), "not finite"),
    (lambda folder: save_file({"other": np.zeros((9, 4), np.float16)}, folder / TABLE), f"has no table {TENSOR}"),
])
def test_a_damaged_wordllama(damage, told, tmp_path, monkeypatch):
    fake_wordllama(tmp_path)
    damage(tmp_path / "wordllama")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=told):
        wordllama_vectors({"a"}, 2)


def test_wordllama_is_optional(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jaxmodels\[wordllama\]'"):
        wordllama_vectors({"a"}, 2)


@pytest.mark.skipif(importlib.util.find_spec("wordllama") is None, reason="wordllama is not installed")
def test_words_of_wordllama_that_are_alike():
    kinds = [("headache", "migraine", "nausea", "vomiting"), ("france", "germany", "italy", "spain")]
    found = wordllama_vectors({word for kind in kinds for word in kind} | {"\U0001f600"}, 6)
    assert set(found) == {word for kind in kinds for word in kind}
    vectors = np.stack([found[word] / np.linalg.norm(found[word]) for kind in kinds for word in kind])
    same = np.arange(8)[:, None] // 4 == np.arange(8) // 4
    cosines = vectors @ vectors.T
    assert cosines[same].mean() > cosines[~same].mean() + 0.3


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("wordllama") is None, reason="wordllama is not installed")
def test_a_tagger_begins_with_them(tmp_path):
    results = run(tmp_path / "out", write(tmp_path), "vectors.name=wordllama", "vectors.limit=50", "epochs=1",
                  "least_steps=50")
    assert results["data.words_with_vectors"] >= len(NAMES) and results["test.f1"] > 0.5
