"""Batches for people to label, and what comes back: formats, places in Unicode, the pool, the command."""

import json
from collections import Counter

import numpy as np
import pytest
from flax import nnx

from analysis.active_learning import annotate
from jaxmodels import cli
from jaxmodels.cnn_cnn_lstm.config import CnnCnnLstmConfig
from jaxmodels.cnn_cnn_lstm.network import CnnCnnLstm
from jaxmodels.cnn_cnn_lstm.tagger import Tagger
from jaxmodels.cnn_cnn_lstm.vocabulary import Vocabulary
from jaxmodels.errors import UserError
from train.data.annotations import FORMATS, Item, identity, read_items, write_items
from train.data.conll import read_conll
from train.data.spans import Span

TEXT = """Anna sees Oslo. Bob sleeps.
👩‍🔬 Dr Ada knows Rome! Carl 💩 sees Lima.
عمر يرى روما. Anna sees Oslo.
Cafe\u0301 Zoe\u0308 opens now.
"""
ITEM = Item(identity("💩 Anna sees Oslo 👍 today"), "💩 Anna sees Oslo 👍 today",
            (Span(2, 6, "PER"), Span(12, 16, "LOC")), (0.91, 0.5), 0.4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as a run of ner leaves it; the tagger knows nothing yet."""
    root = tmp_path_factory.mktemp("run")
    vocabulary = Vocabulary.build([["Anna", "sees", "Oslo", "."]], ["LOC", "PER"], length=8)
    model = CnnCnnLstm(CnnCnnLstmConfig.tiny(**vocabulary.sizes), rngs=nnx.Rngs(3))
    Tagger(model, vocabulary).save(root / "model")
    (root / "pool.txt").write_text(TEXT, "utf-8")
    return root


def command(run, *options):
    return cli.main(["annotate", str(run), "--pool", str(run / "pool.txt"), *map(str, options)])


def exported(path, kind):
    """As the tools export what was imported, all of it accepted."""
    if kind == "label_studio":
        tasks = json.loads(path.read_text("utf-8"))
        tasks = [{"id": i, "data": {"text": task["data"]["text"]},
                  "annotations": [{"was_cancelled": True, "result": []}, {"result": task["predictions"][0]["result"]}]}
                 for i, task in enumerate(tasks)]
        path.write_text(json.dumps(tasks), "utf-8")  # "\ud83d\udca9" stands for one character
    if kind == "doccano":
        rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        path.write_text("".join(json.dumps({"id": i, **row, "Comments": []}) + "\n" for i, row in enumerate(rows)))
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_a_batch_comes_back_as_it_was(kind, tmp_path):
    empty = Item(identity("nothing here"), "nothing here", ())
    path = exported(write_items(tmp_path / "batch", [ITEM, empty], kind), kind)
    found = annotate.matched(read_items(path), {one.id: one.text for one in (ITEM, empty)})
    assert [(one.text, one.spans) for one in found.values()] == [(ITEM.text, ITEM.spans), ("nothing here", ())]


def test_label_studio_in_other_words(tmp_path):
    """JSON_MIN; places in UTF-16 and completions as older versions wrote them; what is not done; other regions."""
    value = {"start": 13, "end": 17, "text": "Oslo", "labels": ["LOC"]}
    (tmp_path / "min.json").write_text(json.dumps([{"id": 1, "text": ITEM.text, "label": [value]}]))
    regions = [{"value": one} for one in (value, {"start": 2, "end": 6, "labels": ["PER"]}, {"choices": ["x"]})]
    tasks = [{"data": {"text": ITEM.text}, "completions": [{"result": regions}]},
             {"data": {"text": "skipped"}, "annotations": [{"was_cancelled": True, "result": []}]}]
    (tmp_path / "full.json").write_text(json.dumps(tasks))
    counts = Counter()
    assert read_items(tmp_path / "min.json", counts)[0].spans == (Span(12, 16, "LOC"),)
    found = read_items(tmp_path / "full.json", counts)
    assert [set(one.spans) for one in found] == [set(ITEM.spans)]
    assert counts == {"utf16": 2, "other_regions": 1, "not_labelled": 1}


def test_relations_between_regions_and_second_labels(tmp_path):
    """A relation has no place, though it may have labels; of two labels of a region the second is counted."""
    regions = [{"type": "labels", "value": {"start": 2, "end": 6, "text": "Anna", "labels": ["PER", "ORG"]}},
               {"type": "relation", "from_id": "a", "to_id": "b", "labels": ["sees"]}, {"value": None}]
    tasks = [{"data": {"text": ITEM.text}, "annotations": [{"result": regions}]},
             {"data": {"text": "none"}, "annotations": [{"result": None}]}]
    (tmp_path / "export").write_text(json.dumps(tasks))
    counts = Counter()
    assert [one.spans for one in read_items(tmp_path / "export", counts)] == [(Span(2, 6, "PER"),), ()]
    assert counts == {"other_regions": 2, "further_labels": 1}


def test_the_pool_is_exact_in_unicode(run):
    counts = Counter()
    pool = annotate.read_pool(run / "pool.txt", Tagger.load(run / "model"), counts)
    assert len(pool) == 6 and counts["repeated_sentences"] == 1
    for name, one in pool.items():
        assert name == identity(one.text) and one.text in TEXT
        assert [one.text[start:stop] for start, stop in one.places] == list(one.words)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_loop(kind, run, tmp_path, capsys):
    """A batch, its export back, the next batch, and training data."""
    first, second, train = tmp_path / "a", tmp_path / "b", tmp_path / "train.conll"
    assert command(run, "--budget", 9, "--out", first, "--format", kind) == 0
    told = capsys.readouterr()
    assert told.out.split() == [str(first)] and "of 6 unlabelled sentences" in told.err
    items = read_items(exported(first, kind))
    assert command(run, "--budget", 100, "--out", second, "--labelled", first, "--train", train) == 0
    rows = [json.loads(line) for line in second.read_text("utf-8").split("\n") if line]
    assert {row["text"] for row in rows}.isdisjoint(one.text for one in items) and len(rows) + len(items) == 6
    for row in rows:
        assert all(0 <= one["confidence"] <= 1 and row["text"][one["start"]:one["end"]] for one in row["entities"])
    back = read_conll(train)
    pool = annotate.read_pool(run / "pool.txt", Tagger.load(run / "model"), Counter())
    assert any(one.spans for one in items)
    assert [one.words for one in back] == [pool[identity(one.text)].words for one in items]
    assert sum(len(one) for one in back) <= 9
    for one, item in zip(back, items, strict=True):
        assert sum(tag[0] == "B" for tag in one.tags) == len(item.spans)


def test_nothing_labelled_does_not_replace_training_data(run, tmp_path, capsys):
    """A batch that is given back as it was, before anybody has labelled it."""
    batch, train = tmp_path / "batch.json", tmp_path / "train.conll"
    assert command(run, "--budget", 9, "--out", batch, "--format", "label_studio") == 0
    train.write_text("Anna\tB-PER\n")
    assert command(run, "--labelled", batch, "--train", train) == 2
    assert "no text is labelled" in capsys.readouterr().err and train.read_text() == "Anna\tB-PER\n"


def test_of_a_text_that_is_labelled_again_the_last_counts(run, tmp_path):
    (tmp_path / "a").write_text('{"text": "Bob sleeps.", "label": [[0, 3, "PER"]]}\n')
    (tmp_path / "b").write_text('{"text": "Bob sleeps.", "label": []}\n')
    pool, counts = annotate.read_pool(run / "pool.txt", Tagger.load(run / "model"), Counter()), Counter()
    found = annotate.labelled([str(tmp_path / "a"), str(tmp_path / "b")], pool, counts)
    assert [one.spans for one in found.values()] == [()] and +counts == Counter(labelled_again=1)


def test_strategies_choose_in_their_order(run):
    tagger = Tagger.load(run / "model")
    pool = annotate.read_pool(run / "pool.txt", tagger, Counter())
    chosen = annotate.choose(tagger, pool, 1000, strategy="lc")
    totals = [tagger.tag([pool[one.id].words])[0].total for one in chosen]
    assert np.all(np.diff(totals) > -1e-5) and len(chosen) == 6


@pytest.mark.parametrize("text, told", [
    ('{"text": "Who is this?", "label": []}\n{"text": "Bob sleeps.", "label": []}', "1 exported texts are not of the "
     "pool: 'Who is this"),
    (json.dumps({"id": identity("Bob sleeps."), "text": "Bob slept.", "label": []}),
     f"1 with another text than the pool's.: {identity('Bob sleeps.')}"),
    ('{"text": "Bob sleeps.", "label": [[0, 99, "PER"]]}', r"export:1: entity 0..99 is not within"),
    ('{"text": "Bob sleeps.", "annotations": [{"label": 7, "start_offset": 0}]}', "without the names of labels"),
    ('{"text": "Bob sleeps."}', "no entities"),
    ('[{"data": {"text": "Bob sleeps."}, "annotations": [{"result": [{"value": {"start": 0, "end": 3, "text": "Rob", '
     '"labels": ["PER"]}}]}]}]', "do not belong together"),
    ('[{"data": {"image": "x"}}]', "task 1 has no text"),
    ('[{"data": 5}]', "task 1 has no text"),
    ('[{"data": {"text": "Bob sleeps."}, "annotations": [7]}]', "task 1: annotations without regions"),
    ('[{"data": {"text": "Bob sleeps."}, "annotations": {"result": []}}]', "annotations are .*, not a list"),
    ('[{"data": {"text": "Bob sleeps."}, "annotations": [{"result": [{"value": {"start": 0, "end": 3, "labels": "PER"'
     '}}]}]}]', "region 1: labels are 'PER', not a list"),
    # Two words would be written as a tag that no reader takes.
    ('[{"data": {"text": "Bob sleeps."}, "annotations": [{"result": [{"value": {"start": 0, "end": 3, "labels": '
     '["A person"]}}]}]}]', "region 1: type 'A person' is empty or has spaces"),
    ("[" * 100_000, "is not JSON"),
    ("[{", "is not JSON"),
])
def test_exports_that_do_not_fit(text, told, run, tmp_path):
    (tmp_path / "export").write_text(text)
    pool = annotate.read_pool(run / "pool.txt", Tagger.load(run / "model"), Counter())
    with pytest.raises(UserError, match=told):
        annotate.training_data(annotate.labelled([str(tmp_path / "export")], pool, Counter()), pool, Counter())


def test_bad_input(run, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a b"}\n{"words": 3}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "a b"}\n{"text": "Bob \\ud83d sleeps."}\n')
    batch = ("--budget", 9, "--out", tmp_path / "x")
    write_items(tmp_path / "all", annotate.choose(Tagger.load(run / "model"), annotate.read_pool(
        run / "pool.txt", Tagger.load(run / "model"), Counter()), 1000, strategy="random"), "jsonl")
    for options, told in (
            ((), "nothing to write"), (("--budget", 9), "nothing to write"), (("--out", "x"), "belong together"),
            (("--train", "x"), "give them with --labelled"), ((*batch, "--strategy", "mnpl"), "mnlp"),
            ((*batch, "--format", "docano"), "doccano"), (("--budget", 1, "--out", "x"), "below the shortest"),
            ((*batch, "--labelled", tmp_path / "all"), "no unlabelled sentence is left"),
            ((*batch, "--pool", tmp_path / "empty.txt"), "no sentence"),
            ((*batch, "--pool", tmp_path / "bad.jsonl"), "bad.jsonl:2: no text"),
            ((*batch, "--pool", tmp_path / "half.jsonl"), "half.jsonl:2: character 4 of the text is half a character"),
            ((*batch, "--pool", tmp_path / "lost.txt"), "cannot be read")):
        assert command(run, *options) == 2
        assert told in capsys.readouterr().err
    assert command(tmp_path, *batch) == 2 and "no folder `model`" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
