"""Skip-gram vectors from a text: words of one kind are alike, and the experiment keeps what it has trained."""

import numpy as np
import pytest

from jaxmodels.errors import UserError
from tests.tiny_ner import NAMES, run, write
from train import skipgram


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
