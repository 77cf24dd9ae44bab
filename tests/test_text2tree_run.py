"""The experiment on texts with codes, tiny, on files written here: every method, interruption, reports, bad input.

Then `jaxmodels predict` with the same run: in one file, so that one worker trains it once.
"""

import csv
import json
import shutil
import types

import numpy as np
import pytest
import tokenizers
from flax import nnx

import analysis.text2tree_report
from jaxmodels import cli
from jaxmodels.errors import Interrupted, UserError
from jaxmodels.hub.tokenizer import Tokenizer
from jaxmodels.text2tree.encoders import CnnConfig, CnnEncoder
from jaxmodels.text2tree.hlr import HlrConfig, LabelEmbeddings
from jaxmodels.text2tree.tree import LabelTree
from tests.tiny_texts import CODES, LEARNS, bert_folder, config, prepared, run, trained, write
from train import predict, text2tree
from train.data import records
from train.data.coded_texts import Columns, coded_texts
from train.runtime.config import resolve, to_dict
from train.runtime.run_folder import RunFolder
from train.text2tree_config import METHODS
from train.text_labels import label_states, tree_arrays, tree_from
from train.text_reader import Reader, learned, make_reader


@pytest.fixture(scope="module")
def finished():
    return trained()


def test_it_learns_what_the_words_tell(finished):
    results, out, _ = finished
    assert results["status"] == "complete" and results["data.classes"] == 5 and results["data.train_texts"] == 96
    assert results["test.model.tuned_macro_f1"] > 0.6 and results["test.tfidf.tuned_macro_f1"] > 0.8
    assert 0.05 <= results["test.model.threshold"] <= 0.95
    assert not (out / "checkpoints").exists()  # of a finished run nobody asks for them
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["dml"]) and np.isfinite(line["ssl"]) for line in lines)
    assert max(line.get("dev_macro_f1", 0) for line in lines) == next(
        line["dev_macro_f1"] for line in lines if line["step"] == results["chosen_step"])


def test_the_kept_model_has_no_label_states_and_gives_the_same_answers(finished):
    results, out, path = finished
    arrays = np.load(out / "model.npz")
    assert not [name for name in arrays.files if name.startswith("labels")]
    saved = np.load(out / "predictions.npz")
    said = saved["model_scores"].astype(np.float32) >= results["test.model.threshold"]
    assert saved["model_scores"].shape == (32, 5)
    assert (saved["model_said"] == said).mean() > 0.99  # stored in half precision


def test_the_report(finished):
    results, out, _ = finished
    page = analysis.text2tree_report.build(out).read_text()
    for told in ("TF-IDF", "A41.0", "tail", "ECE", "Cosines of the states", "siblings", "labels nearest", "patient"):
        assert told in page
    for name in ("model", "tfidf"):
        value = {end: results[f"test.{name}.tuned_macro_f1{end}"] for end in ("", "_low", "_high")}
        assert value["_low"] <= value[""] <= value["_high"] and f"test.{name}.tuned_macro_f1_tail_low" in results


def test_what_is_kept_of_the_labels(finished):
    states = np.load(finished[1] / "labels.npz")
    assert states["before"].shape == states["after"].shape == (5, 72) and states["after"].dtype == np.float16
    assert not np.array_equal(states["before"], states["after"])
    np.testing.assert_allclose(states["attention"].sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(states["attention"][1, :2].sum(), 1, atol=1e-5)  # A41, B20, C11: no siblings
    examples = json.loads((finished[1] / "examples.json").read_text())
    assert {example["code"] for example in examples} <= set(CODES)
    assert all(example["code"] in example["codes"] and len(example["text"]) <= 303 for example in examples)


@pytest.mark.long
def test_shares_of_attention_are_those_of_families():
    tree = LabelTree.from_codes([*CODES, "B20"])
    dense, sparse = (LabelEmbeddings(tree, HlrConfig(4, attention=kind), rngs=nnx.Rngs(0))
                     for kind in ("dense", "sparse"))
    np.testing.assert_allclose(label_states(dense)[1], label_states(sparse)[1], atol=1e-6)
    frozen = LabelEmbeddings(tree, HlrConfig(2, start="fixed"), start=np.ones((len(tree), 2)), rngs=nnx.Rngs(0))
    assert label_states(frozen)[1].shape == (0, 3)


def test_a_finished_run_is_not_trained_again(finished, monkeypatch, capsys):
    _, out, path = finished
    monkeypatch.setattr(text2tree, "prepare", None)
    run(out, path, *LEARNS)
    assert "has changed" not in capsys.readouterr().err
    monkeypatch.setattr(text2tree, "read", lambda cfg: types.SimpleNamespace(digest="of other texts"))
    run(out, path, *LEARNS)
    assert f"path:{path} has changed since {out} was trained with it" in capsys.readouterr().err


@pytest.mark.long
def test_a_run_goes_on_where_it_stopped(finished, tmp_path):
    results, whole, path = finished
    options = LEARNS
    with pytest.raises(Interrupted):
        run(tmp_path / "out", path, *options, stop_at=13)
    assert list((tmp_path / "out" / "checkpoints").iterdir())
    again = run(tmp_path / "out", path, *options)
    assert again["chosen_step"] == results["chosen_step"]
    a, b = (np.load(folder / "model.npz") for folder in (whole, tmp_path / "out"))
    assert all(np.array_equal(a[name], b[name]) for name in a.files)


@pytest.mark.parametrize("method", [pytest.param(name, marks=pytest.mark.long)
                                    for name in METHODS if name != "oversampling"])
def test_every_method_runs(method, tmp_path):
    found = run(tmp_path / "out", write(tmp_path / "notes.csv"), f"method.name={method}")
    assert found["method"] == method and 0 <= found["test.model.tuned_macro_f1"] <= 1


@pytest.mark.long
@pytest.mark.parametrize("method", ["oversampling", "text2tree", "supcon", "htc", "logit_adjustment"])
def test_one_code_a_text(method, tmp_path):
    found = run(tmp_path / "out", write(tmp_path / "notes.csv", multi=False), f"method.name={method}")
    assert "test.model.threshold" not in found and found["test.model.accuracy"] == found["test.model.micro_f1"]
    assert "test.tfidf.accuracy_level_1" in found


@pytest.mark.parametrize("method", ["plain", "oversampling"])
def test_every_method_has_the_same_budget(method, tmp_path):
    """Texts that oversampling repeats make an epoch no longer."""
    trial = prepared(tmp_path / "out", write(tmp_path / "notes.csv", multi=False), f"method.name={method}")
    assert (trial.cfg.loop.steps, trial.cfg.loop.evaluate_every) == (12, 6)  # 2 epochs of 96 texts in batches of 16


def test_what_is_amiss_is_told_once(tmp_path, capsys):
    path = write(tmp_path / "notes.csv", multi=False)
    with open(path, "a") as file:
        file.write("bare,,test\n")
    for out in ("a", "b"):
        prepared(tmp_path / out, path, "method.name=plain")
        results = json.loads((tmp_path / out / "results.json").read_text())
        assert results["data.multi_label"] and results["data.texts_without_code"] == 1
    assert capsys.readouterr().err.count(f"path:{path}: 1 texts have no code") == 1


def test_a_file_that_has_changed_is_not_taken_for_the_old_one(tmp_path):
    """A run that was begun is refused, and a new one beside it (of a sweep) gets records of its own."""
    path, shared = write(tmp_path / "notes.csv"), tmp_path / "sweep"
    cfg = config(path, "method.name=plain")

    def begin(name):
        with RunFolder.open("text2tree", to_dict(cfg), shared / name) as folder:
            folder.shared = shared
            return text2tree.prepare(cfg, folder)

    first = begin("a")
    assert begin("a").data == begin("b").data == first.data
    text = (tmp_path / "notes.csv").read_text()
    (tmp_path / "notes.csv").write_text(text.replace(";B20.1,", ";B20.2,"))
    with pytest.raises(UserError, match="texts or codes of path:.* have changed since"):
        begin("a")
    other = begin("c")
    labels = np.stack([row["labels"] for row in records.open_records(other.data, "train")])
    assert np.array_equal(labels, other.source.parts["train"].labels) and other.data != first.data


@pytest.mark.long
def test_states_of_other_frozen_layers_are_made_anew(tmp_path):
    """In a sweep whose encoder is a folder that has been trained on between two of its trials."""
    path, folders = write(tmp_path / "notes.csv", count=80), []
    for seed in (0, 1):
        cfg = config(path, "method.name=plain", f"encoder.name={bert_folder(tmp_path / 'bert', seed)}",
                     "encoder.frozen=1")
        with RunFolder.open("text2tree", to_dict(cfg), tmp_path / str(seed)) as folder:
            folder.shared = tmp_path
            folders.append(text2tree.prepare(cfg, folder).data)
    first, second = (records.open_records(folder, "train")[0]["tokens"] for folder in folders)
    assert first.shape == second.shape and not np.array_equal(first, second)


@pytest.mark.parametrize("method", ["plain", "text2tree", "recursive", "hiagm", "logit_adjustment"])
def test_scores_begin_at_how_often_codes_occur(method, tmp_path):
    """All at one half would take the first epochs to unlearn. (logit_adjustment adds the shares in its loss.)"""
    trial = prepared(tmp_path / "out", write(tmp_path / "notes.csv"), f"method.name={method}")
    labels, tree = trial.source.parts["train"].labels, trial.source.tree
    bias = np.asarray(trial.start.head.out_bias[...])
    if len(bias) > tree.num_classes:  # over nodes
        bias = bias[tree.leaf_index - 1]
    shares = 1 / (1 + np.exp(-bias))
    np.testing.assert_allclose(shares, 0.5 if method == "logit_adjustment" else labels.mean(0), rtol=1e-5)


@pytest.mark.parametrize("method", ["plain", "htc", "hiagm"])
def test_so_do_sigmoids_over_nodes_where_texts_have_one_code(method, tmp_path):
    trial = prepared(tmp_path / "out", write(tmp_path / "notes.csv", multi=False), f"method.name={method}")
    labels, tree = trial.source.parts["train"].labels, trial.source.tree
    shares = 1 / (1 + np.exp(-np.asarray(trial.start.head.out_bias[...], float)))
    below = [np.mean([node in tree.paths[label] for label in labels]) for node in range(1, len(tree))]
    np.testing.assert_allclose(shares, 0.5 if method == "plain" else below, rtol=1e-5)


@pytest.mark.parametrize("method, ends, chosen", [("plain", 18, 6), ("ldam_drw", None, 54)])
def test_re_weighting_has_begun_before_training_ends(method, ends, chosen, tmp_path):
    """Of 60 steps in 10 epochs ldam_drw re-weights the last 12; the scores are best before that."""
    trial = prepared(tmp_path / "out", write(tmp_path / "notes.csv"), f"method.name={method}", "epochs=10",
                     "patience=2")
    scores = {6 * (epoch + 1): score for epoch, score in enumerate((9, 8, 7, 6, 5, 4, 3, 2, 1, 0))}
    over = None
    for at, score in scores.items():
        trial.best.scores[at] = score
        if trial.best.over(at):
            over = at
            break
    assert over == ends and trial.best.step(60) == chosen


def test_a_code_at_the_root_has_no_place_in_a_head_over_nodes():
    """logits[:, -1], of another node, would stand for it."""
    tree = LabelTree.from_table([("all", None), ("one", "all"), ("two", "all")], ["all", "one", "two"])
    plain, nodes = (resolve("text2tree", ["data.path=a.csv", f"method.name={name}"]) for name in ("plain", "htc"))
    assert text2tree.outputs(plain, tree) == 3
    with pytest.raises(UserError, match="method.name=htc has no output for the root of the tree, and 'all' is one"):
        text2tree.outputs(nodes, tree)


@pytest.mark.parametrize("mask", ["[MASK]", "<mask>", "none"])
def test_the_root_begins_as_a_masked_piece(mask):
    """RoBERTa spells it otherwise than BERT."""
    pieces = tokenizers.Tokenizer.from_str(learned(list(CODES), 300).inner.to_str().replace("[MASK]", mask))
    encoder = CnnEncoder(CnnConfig(pieces.get_vocab_size(), d_embed=6, filters=2), rngs=nnx.Rngs(0))
    tree, cfg = LabelTree.from_codes(CODES), resolve("text2tree", ["data.path=a.csv", "method.start=label"])
    reader = Reader(Tokenizer(pieces), encoder, None, None)
    if mask == "none":
        with pytest.raises(UserError, match="method.start=label needs a piece"):
            text2tree.build(cfg, tree, reader)
        return
    table = text2tree.build(cfg, tree, reader).labels.nodes[...]
    assert np.array_equal(table[0], encoder.embed[pieces.token_to_id(mask)]) and np.isfinite(table).all()


@pytest.mark.parametrize("start", ["label", "fixed"])
def test_label_states_may_begin_with_a_small_cnn(start, tmp_path):
    """Of another width than the one by default."""
    cfg = resolve("text2tree", ["data.path=a.csv", "encoder.name=cnn", "encoder.filters=8", f"method.start={start}"])
    reader = make_reader(cfg.encoder, ["some words of a text"] * 20, 0, tmp_path)
    assert text2tree.build(cfg, LabelTree.from_codes(CODES), reader).labels.nodes.shape[1] == reader.encoder.width == 24


def test_long_texts_are_read_in_chunks():
    reader = Reader(learned(["some words of a long text"] * 9, 300), None, None, None)
    short, long = "words of a text", " ".join(["some words of a long text"] * 8)
    whole, there = (a[1] for a in reader.tokens([short, long], 1000))
    tokens, mask = reader.tokens([short, long], 16, chunks=99)
    assert tokens.shape == (2, -(-(there.sum() - 2) // 14), 16) and mask.any(-1).sum(1).tolist() == [1, tokens.shape[1]]
    inside = [row[m][1:-1] for row, m in zip(tokens[1], mask[1], strict=True)]  # without [CLS] and [SEP]
    assert np.array_equal(np.concatenate(inside), whole[there][1:-1])
    assert reader.tokens([short, long], 16, chunks=2)[0].shape == (2, 2, 16)
    assert reader.tokens([short], 64, chunks=2)[0].shape == (1, 1, 16)


@pytest.mark.long
@pytest.mark.parametrize("method", ["text2tree", "plain", "mixup", "recursive", "supcon"])
def test_chunks_with_every_kind_of_loss(method, tmp_path):
    path = write(tmp_path / "notes.csv")
    found = run(tmp_path / "out", path, f"method.name={method}", "data.length=8", "data.chunks=3")
    assert 0 < found["test.model.tuned_macro_f1"] <= 1
    assert len(np.load(tmp_path / "out" / "model.npz")["head/attention"]) == 24


def test_bad_input(tmp_path):
    path = write(tmp_path / "notes.csv")
    with pytest.raises(UserError, match="is for texts with one code"):
        run(tmp_path / "out", path, "method.name=oversampling")
    with pytest.raises(UserError, match="give one of them"):
        run(tmp_path / "out", path, "data.source=mesh_pubmed")
    with pytest.raises(UserError, match=r"data.batch=512 is more than the 96 training texts"):
        run(tmp_path / "out", path, "data.batch=512")
    with pytest.raises(UserError, match="no model named 'cnm'"):
        run(tmp_path / "out", path, "encoder.name=cnm")
    with pytest.raises(UserError, match="loop.steps=9: steps are made of the epochs here"):
        run(tmp_path / "out", path, "loop.steps=9")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("override, message", [
    ("method.gamma=2", "method.gamma=2"), ("method.name=best", "method.name"), ("encoder.frozen=-1", "encoder.frozen"),
    ("epochs=0", "epochs=0"), ("data.chunks=0", "data.chunks=0 must be at least 1"),
    ("loop.style=pmap", "loop.style=pmap"), ("method.labels_rate=-1", "method.labels_rate=-1.0 must be at least 0"),
    ("method.focal_alpha=2", "method.focal_alpha=2.0 must lie between 0 and 1"),
    ("data.source=codiesp data.tree=icd10cm", "data.tree=icd10cm is about a CSV .*data.source=codiesp has"),
    ("encoder.name=cnn encoder.frozen=2", "a cnn encoder is trained whole"),
    ("method.label_encoder=gcn method.start=fixed", "without a method.label_encoder"),
])
def test_bad_values(override, message):
    """Those that nothing would read among them."""
    with pytest.raises(UserError, match=message):
        resolve("text2tree", override.split())


# jaxmodels predict


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


def test_bytes_that_are_no_text(tmp_path):
    """As Python gives arguments that a Latin-1 terminal has passed on."""
    for name, about in (("config", {"name": "text2tree"}), ("results", {"status": "complete"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="text 2 holds bytes that are not UTF-8"):
        predict.predict(tmp_path, ["fever", b"fi\xe8vre".decode("utf-8", "surrogateescape")])
