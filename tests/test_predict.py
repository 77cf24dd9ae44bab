"""`jaxmodels predict`: the answers are those of the run, without its data; what it refuses."""

import csv
import json
import shutil

import numpy as np
import pytest

from jaxmodels import cli
from jaxmodels.errors import UserError
from tests.tiny_texts import CODES, bert_folder, run, trained, write
from train import predict
from train.data.coded_texts import Columns, coded_texts
from train.text_labels import tree_arrays, tree_from


@pytest.fixture(scope="module")
def finished():
    return trained()


def same_as_the_run(out, path):
    """Predictions of the test texts against what the run has saved; half precision holds 3 digits."""
    texts = coded_texts(f"path:{path}", columns=Columns(split="split")).parts["test"].texts
    saved, codes = np.load(out / "predictions.npz"), np.load(out / "classes.npz")["codes"].tolist()
    found = predict.predict(out, texts, top=len(codes))
    scores, said = np.zeros((len(texts), len(codes)), np.float32), np.zeros((len(texts), len(codes)), bool)
    for text, (score, given, code, *_) in found.rows:
        scores[text, codes.index(code)], said[text, codes.index(code)] = score, given == "yes"
    np.testing.assert_allclose(scores, saved["model_scores"].astype(np.float32), atol=5e-4)
    assert np.array_equal(said, saved["model_said"])
    default = predict.predict(out, texts).rows
    assert [(text, values[2]) for text, values in default] == [
        (i, codes[k]) for i, row in enumerate(scores) for k in np.argsort(-row, kind="stable") if said[i, k]]


def test_it_answers_as_the_run_did(finished):
    same_as_the_run(*finished[1:])


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("data.length=8", "data.chunks=3")])
def test_frozen_layers_are_loaded_again_by_their_name(options, tmp_path):
    path = write(tmp_path / "notes.csv", count=100)
    run(tmp_path / "out", path, f"encoder.name={bert_folder(tmp_path / 'bert')}", "encoder.frozen=1", "epochs=1",
        *options)
    (tmp_path / "notes.csv").rename(tmp_path / "elsewhere.csv")
    shutil.rmtree(next((tmp_path / "out").glob("data-*")))
    same_as_the_run(tmp_path / "out", tmp_path / "elsewhere.csv")


def test_the_tree_comes_back(finished):
    tree = coded_texts(f"path:{finished[2]}", columns=Columns(split="split")).tree
    again = tree_from(np.load(finished[1] / "classes.npz"))
    assert again == tree and again.num_levels == 3
    described = type(tree).from_codes(["A41.9", "B20.1"], {"A41": "Other sepsis"})
    assert tree_from(tree_arrays(described)).descriptions == {"A41": "Other sepsis"}


def test_the_command(finished, tmp_path, capsys):
    out = str(finished[1])
    assert cli.main(["predict", out, "--text", "the virus liver", "--text", "tumour neck", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["text", "score", "given", "code", "description"] and len(lines) == 5
    assert lines[0].split()[-2:] == ["level_3", "level_3_description"]
    (tmp_path / "in.csv").write_text("note,who\n" + "".join(f"and {i} tumour neck,x\n" for i in range(70)))
    file = tmp_path / "out.csv"
    assert cli.main(["predict", out, "--csv", str(tmp_path / "in.csv"), "--column", "note", "--top", "1",
                     "--out", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(file)]
    rows = list(csv.DictReader(file.open()))
    assert [row["text"] for row in rows] == [str(i + 1) for i in range(70)]
    assert all(row["code"] in CODES and row["level_1"] == row["code"][0] and row["level_3"] == row["code"]
               for row in rows)


def test_texts_without_an_answer_are_counted(finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished[1], out)
    results = json.loads((out / "results.json").read_text())
    (out / "results.json").write_text(json.dumps(results | {"test.model.threshold": 1.1}))
    assert cli.main(["predict", str(out), "--text", "fever"]) == 0
    assert "1 of 1 texts have no answer above the run's threshold" in capsys.readouterr().err


@pytest.mark.parametrize("words, told", [
    (["RUN"], "one of the arguments --text --csv is required"),
    (["RUN", "--text", "  "], "1 of 1 texts is empty"),
    (["RUN", "--text", "a", "--top", "0"], "--top 0: it must be at least 1"),
    (["RUN", "--csv", "in.csv"], "--csv FILE and --column NAME belong together"),
    (["RUN", "--csv", "in.csv", "--column", "nota"], "in.csv has no column 'nota'; it has note: name them with "
                                                     "--column"),
    (["RUN", "--csv", "in.csv", "--column", "note"], "in.csv: 1 of 2 texts in 'note' are empty, line 3"),
    (["RUN", "--csv", "none.csv", "--column", "note"], "none.csv cannot be read"),
    (["nowhere", "--text", "a"], "nowhere is not a run folder: it has no config.json"),
    (["other", "--text", "a"], "other is a run of atlas, which predicts nothing"),
    (["stopped", "--text", "a"], "stopped is not finished (status: interrupted)"),
    (["lost", "--text", "a"], "classes.npz is missing or damaged"),
])
def test_what_it_refuses(words, told, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.csv").write_text('note\nfever\n" "\n')
    for name in ("other", "stopped", "lost"):
        (tmp_path / name).mkdir()
        about = json.loads((finished[1] / "config.json").read_text())
        about = {"name": "atlas", "config": {"predict": "os:abort"}} if name == "other" else about  # not to be called
        (tmp_path / name / "config.json").write_text(json.dumps(about))
        status = "interrupted" if name == "stopped" else "complete"
        (tmp_path / name / "results.json").write_text(json.dumps({"status": status}))
    assert cli.main(["predict", *(str(finished[1]) if word == "RUN" else word for word in words)]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_from_python_too(finished):
    with pytest.raises(UserError, match="no text is given"):
        predict.predict(finished[1], [])
