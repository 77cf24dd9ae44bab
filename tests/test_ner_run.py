"""The experiment `ner`, tiny, on files written here: learning by heart, going on, predicting, bad input; the tagger."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx

from analysis import ner_report
from jaxmodels import cli
from jaxmodels.cnn_cnn_lstm.config import CnnCnnLstmConfig
from jaxmodels.cnn_cnn_lstm.network import CnnCnnLstm
from jaxmodels.cnn_cnn_lstm.passes import dropout_passes, entity_votes
from jaxmodels.cnn_cnn_lstm.schemes import Entity, entities
from jaxmodels.cnn_cnn_lstm.tagger import LENGTHS, Tagger
from jaxmodels.cnn_cnn_lstm.vocabulary import Vocabulary, pieces
from jaxmodels.errors import Interrupted, UserError
from tests.tiny_ner import run, sentences, trained, write
from train import ner
from train.data.word_vectors import write_vectors
from train.runtime.config import resolve


@pytest.fixture(scope="module")
def finished():
    return trained()


@pytest.fixture(scope="module")
def tagger(finished):
    return Tagger.load(finished[1] / "model")


def test_it_learns_sentences_by_heart(finished):
    results, out, _ = finished
    assert results["status"] == "complete" and results["data.train_sentences"] == 24
    assert results["dev_f1"] == results["test.f1"] == results["test.Drug.f1"] == results["test.surface_f1"] == 1
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.2 < lines[0]["loss"] and lines[-1]["step"] == 75
    assert {line["step"] for line in lines if "dev_f1" in line} == {25, 50, 75}
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and all([said[:3] for said in row["said"]] == row["truth"] for row in rows)
    votes = [said[4] for row in rows for said in row["said"]]
    assert results["test.entity_ece_votes"] == pytest.approx(1 - np.mean(votes))  # all is right
    assert set(votes) <= {n / 10 for n in range(11)} and np.mean(votes) > 0.5
    page = (ner_report.build(out)).read_text()
    assert "votes" in page and "probabilities" in page


def test_a_finished_run_is_not_trained_again(finished, monkeypatch):
    _, out, data = finished
    monkeypatch.setattr("train.ner.train", None)
    run(out, data, "epochs=1", "least_steps=75")


@pytest.mark.long
def test_a_run_goes_on_where_it_stopped(finished, tmp_path):
    results, whole, data = finished
    with pytest.raises(Interrupted):
        run(tmp_path / "out", data, "epochs=1", "least_steps=75", stop_at=33)
    again = run(tmp_path / "out", data, "epochs=1", "least_steps=75")
    assert again["chosen_step"] == results["chosen_step"]
    a, b = (Tagger.load(folder / "model") for folder in (whole, tmp_path / "out"))
    assert all(np.array_equal(x, y) for x, y in zip(*(nnx.to_pure_dict(nnx.state(t.model))["words"]["convs"][0].values()
                                                      for t in (a, b)), strict=True))


@pytest.mark.long
@pytest.mark.parametrize("options", [
    ("model.head=crf",), ("model.d_tag=0", "beam=3"), ("model.char_layers=2",), ("loop.style=per_device",),
    ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"), ("model.head=crf", "loop.style=per_device"),
])
def test_other_models_learn_too(options, tmp_path):
    results = run(tmp_path / "out", write(tmp_path), "epochs=1", "least_steps=100", *options)
    assert results["test.f1"] > 0.9 and ("test.beam_3.f1" in results) == ("beam=3" in options)


@pytest.mark.long
def test_vectors_from_a_file(tmp_path):
    r = np.random.default_rng(0)
    write_vectors(tmp_path / "v.txt", ["aspirin", "fever", "unseen"], r.normal(size=(3, 10)))
    data = tmp_path / "data"
    data.mkdir()
    options = ("vectors.name=file", f"vectors.path={tmp_path / 'v.txt'}", "epochs=1", "least_steps=25")
    results = run(tmp_path / "out", write(data), *options)
    assert results["data.words_with_vectors"] == 2
    assert "unseen" in Tagger.load(tmp_path / "out" / "model").vocabulary.words
    with pytest.raises(UserError, match=r"model.d_word=9, the vectors of .* have 10; set model.d_word=10"):
        run(tmp_path / "other", data, *options, "model.d_word=9")


def test_steps_are_made_of_the_epochs(tmp_path):
    with pytest.raises(UserError, match="loop.evaluate_every=9: steps are made of the epochs here"):
        run(tmp_path / "out", tmp_path, "loop.evaluate_every=9")


def test_sentences_that_have_changed(tmp_path, monkeypatch):
    """A run that has begun refuses them; rows of the old ones, which are numbers of their words, serve no other run."""
    made = []

    def prepares(cfg, folder, source, start, mesh):
        made.append(ner.prepare_data(cfg, folder, source, start))
        raise Interrupted("stopped")

    monkeypatch.setattr(ner, "train", prepares)
    (tmp_path / "data").mkdir()
    for count, out in ((24, "out"), (25, "other")):
        data = write(tmp_path / "data", count)
        with pytest.raises(Interrupted):
            run(tmp_path / out, data)
    assert len({path.name for path in made}) == 2
    with pytest.raises(UserError, match="sentences or tags of path:.*data have changed since .*out was begun with"):
        run(tmp_path / "out", data)


def test_predict(finished, capsys):
    text = "😀 Aspirin eases  pain. Severe\u00a0fever came after Heparin."
    assert cli.main(["predict", str(finished[1]), "--text", "Nothing was seen.", "--text", text]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:4] == ["text", "start", "end", "type"]
    places = [(int(line[0]), int(line[1]), int(line[2]), line[3]) for line in lines[1:]]
    assert [(n, text[a:b], kind) for n, a, b, kind in places] == [
        (2, "Aspirin", "Drug"), (2, "pain", "Ill"), (2, "Severe\u00a0fever", "Ill"), (2, "Heparin", "Drug")]
    assert all(0 < float(line[-1]) <= 1 for line in lines[1:])
    assert cli.main(["predict", str(finished[1]), "--text", text, "--top", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_votes_as_confidences(finished, tmp_path, capsys):
    """They are asked for in a finished run, and change nothing else in it."""
    _, out, data = finished
    shutil.copytree(out, tmp_path / "out")
    run(tmp_path / "out", data, "epochs=1", "least_steps=75", "confidence=votes")
    text = ["--text", "Aspirin eases pain."]
    sure = []
    for folder in (out, tmp_path / "out"):
        assert cli.main(["predict", str(folder), *text]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
        sure.append([(line[1], line[2], line[-1]) for line in lines])
        shares = [float(line[5]) * 10 for line in lines]
    assert sure[0] == sure[1] and len(shares) == 2
    assert shares == pytest.approx(np.round(shares), abs=1e-4) and 0 < max(shares) <= 10
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == (out / "predictions.jsonl").read_bytes()


@pytest.mark.parametrize("override, told", [
    ("data.batch=4096", "data.batch=4096 is more than the .* rows of 16 positions"),
    ("data.source=bc5cdr", "data.path=.* and data.source=bc5cdr: give one of them"),
])
def test_bad_input(override, told, finished, tmp_path):
    with pytest.raises(UserError, match=told):
        run(tmp_path / "out", finished[2], override)


@pytest.mark.parametrize("override, told", [
    ("epochs=0", "epochs=0"), ("votes=-1", "votes=-1"), ("data.limit=0", "data.limit=0"),
    ("model.chars=3", "model.chars=3"), ("votes=0 confidence=votes", "votes=0 must be"),
    ("vectors.name=file", "vectors.name=file and vectors.path=None"), ("model.head=softmax", "expected lstm|crf"),
    ("loop.style=pmap", "loop.style=pmap"),
])
def test_bad_values(override, told):
    with pytest.raises(UserError, match=told):
        resolve("ner", override.split(" "))


# The tagger


def test_tags_do_not_depend_on_company(tagger):
    """Alone, among others, longer than a row, with characters never seen; an empty sentence."""
    one = list(sentences(1)[0].words)
    odd = ["\u4e2d\U0001f600", "x" * 99, "Aspirin"]
    among = tagger.tag([one, [], odd, *[list(s.words) for s in sentences(9, 1)]])
    assert tagger.tag([one])[0].tags == among[0].tags and among[1].tags == [] and among[1].total == 0
    np.testing.assert_allclose(tagger.tag([odd])[0].log_prob, among[2].log_prob, atol=1e-5)
    assert len(among[2].tags) == 3 and among[0].total == pytest.approx(among[0].log_prob.sum(), abs=1e-5)


@pytest.mark.long
def test_a_sentence_of_5000_words(tagger):
    """Read in parts, each as if it stood alone, and joined again."""
    words = ["Aspirin", "eases"] * 2500
    found = tagger.tag([words])[0]
    alone = tagger.tag([words[start:stop] for start, stop in pieces(len(words), LENGTHS[-1] - 2)])
    assert len(found.tags) == len(found.log_prob) == 5000 and "B-Drug" in found.tags
    assert list(found.tags) == [tag for part in alone for tag in part.tags]
    np.testing.assert_allclose(found.log_prob, np.concatenate([part.log_prob for part in alone]), atol=1e-5)


def test_what_is_saved_is_what_is_loaded(tagger, tmp_path):
    tagger.save(tmp_path / "model")
    again = Tagger.load(tmp_path / "model")
    assert (again.vocabulary, again.joins, again.calibration) == (tagger.vocabulary, tagger.joins, tagger.calibration)
    words = [list(one.words) for one in sentences(5, 2)]
    assert [one.total for one in again.tag(words)] == [one.total for one in tagger.tag(words)]
    with pytest.raises(UserError, match="is not empty"):
        tagger.save(tmp_path / "model")


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values))


@pytest.mark.parametrize("damage, told", [
    (lambda folder: (folder / "vocabulary.json").unlink(), "vocabulary.json is missing or damaged"),
    (lambda folder: (folder / "vocabulary.json").write_text('{"words": []}'), "the vocabulary is damaged"),
    (lambda folder: (folder / "vocabulary.json").write_text("[]"), "holds a JSON list, not an object"),
    (lambda folder: change(folder / "vocabulary.json", calibration={"x": [1, 2]}), "no two numbers each for entity"),
    (lambda folder: change(folder / "vocabulary.json", calibration={"entity": [1]}), "no two numbers each for entity"),
    (lambda folder: change(folder / "vocabulary.json", calibration=[]), "no two numbers each for entity and sentence"),
    (lambda folder: change(folder / "vocabulary.json", joins=[1]), "joins is .1., no list of strings"),
    (lambda folder: change(folder / "vocabulary.json", joins=["a-("]), "vocabulary.json is missing or damaged"),
    (lambda folder: change(folder / "config.json", char_layers=1001), "char_layers 1001 is over the limit of 1000"),
    (lambda folder: change(folder / "config.json", word_layers=10**9), "word_layers 1000000000 is over the limit"),
    (lambda folder: change(folder / "config.json", words=5.5), "words is 5.5, no size"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "holds a 'bert', not a tagger"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "cnn_cnn_lstm"}'), "config.json is damaged"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "shorter than a safetensors header"),
])
def test_damaged_folders(damage, told, finished, tmp_path):
    shutil.copytree(finished[1] / "model", tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=told):
        Tagger.load(tmp_path / "model")


def test_a_vocabulary_that_belongs_to_another_model():
    vocabulary = Vocabulary.build([["a"]], ["X"])
    with pytest.raises(UserError, match="the model has 40 words, the vocabulary 5"):
        Tagger(CnnCnnLstm(CnnCnnLstmConfig.tiny(), rngs=nnx.Rngs(0)), vocabulary)


def test_passes_with_dropout(tagger):
    words = [["Aspirin", "and", "shock"], [], ["Unheard", "of"]]
    a, b, c = (dropout_passes(tagger, words, 4, seed=seed) for seed in (0, 0, 1))
    assert [one.tags.shape for one in a] == [(4, 3), (4, 0), (4, 2)] and a[0].tags.dtype == np.int8
    for x, y in zip(a, b, strict=True):
        assert np.array_equal(x.tags, y.tags) and np.array_equal(x.information, y.information)
    assert not np.array_equal(a[2].information, c[2].information)
    sure = tagger.tag(words)
    assert [tagger.vocabulary.tags[k] for k in a[0].tags[0, :1]] == ["S-Drug"] and sure[0].tags[0] == "B-Drug"
    assert a[0].information.min() >= 0 and a[2].information.max() > a[0].information[0]
    inside = dropout_passes(tagger, words, 4, where="decoder")
    assert inside[2].information.max() > 0 and not np.array_equal(inside[2].information, a[2].information)
    with pytest.raises(UserError, match="passes=0"):
        dropout_passes(tagger, words, 0)


def test_votes_for_entities(tagger):
    """Shares of the passes that find an entity of the same words and type; without dropout all do."""
    words = [["Aspirin", "and", "shock"], [], ["Nothing", "was"], ["Unheard", "fever"]]
    drug = Entity(0, 1, "Drug")
    said = [[drug, Entity(0, 2, "Drug"), Entity(0, 1, "Ill")], [], [], [Entity(0, 2, "Ill"), Entity(1, 2, "Ill")]]
    shares = entity_votes(tagger, words, said, 8)
    assert [len(one) for one in shares] == [3, 0, 0, 2] and shares == entity_votes(tagger, words, said, 8)
    names = tagger.vocabulary.tags
    found = dropout_passes(tagger, [words[0], words[3]], 8)
    counts = [[sum(entity in entities([names[k] for k in ids]) for ids in one.tags) for entity in asked]
              for one, asked in zip(found, (said[0], said[3]), strict=True)]
    assert [[8 * share for share in shares[i]] for i in (0, 3)] == counts and counts[0][0] > counts[0][1]
    vocabulary = Vocabulary.build([["a", "b"]], ["X"], length=6)
    sure = Tagger(CnnCnnLstm(CnnCnnLstmConfig.tiny(**vocabulary.sizes, dropout=0.0), rngs=nnx.Rngs(0)), vocabulary)
    text = [["a", "b", "b", "a"][:n] for n in (1, 2, 3, 4)]
    said = [entities(one.tags) for one in sure.tag(text)]
    assert sum(map(len, said)) and all(share == 1 for one in entity_votes(sure, text, said, 3) for share in one)


@pytest.mark.long
def test_passes_of_a_crf_and_of_more_layers():
    vocabulary = Vocabulary.build([["a", "b"]], ["X"], length=6)
    for changes in ({"head": "crf"}, {"char_layers": 2}):
        model = CnnCnnLstm(CnnCnnLstmConfig.tiny(**vocabulary.sizes, **changes), rngs=nnx.Rngs(0))
        tagger = Tagger(model, vocabulary)
        both, votes = (dropout_passes(tagger, [["a", "b"]], 3, information=told)[0] for told in (True, False))
        assert both.information.max() > 0 and votes.information is None and np.array_equal(both.tags, votes.tags)
    with pytest.raises(UserError, match="a CRF"):
        dropout_passes(Tagger(CnnCnnLstm(CnnCnnLstmConfig.tiny(**vocabulary.sizes, head="crf"), rngs=nnx.Rngs(0)),
                              vocabulary), [["a"]], 2, where="decoder")
