"""Active learning end to end on sentences written here: sets, budgets, interruption, modes, strategies, curves, report.

One study is run for all tests, and every learner has its shapes, so that each program is compiled once.
"""

import dataclasses
import json
import re
import tracemalloc
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from analysis import ner_report
from analysis.active_learning import curves, report, strategies, study
from analysis.active_learning.claims import NO, OPEN, YES, judged
from analysis.active_learning.config import STRATEGIES, ProtocolConfig, StudyConfig, words_of
from analysis.active_learning.learner import ActiveLearner, RoundRecord, run_together
from analysis.active_learning.lockstep import Steps
from analysis.active_learning.oracle import FileOracle, GoldOracle
from jaxmodels.cnn_cnn_lstm.tagger import Tagged
from jaxmodels.errors import Interrupted, UserError
from train import ner
from train.data.conll import Sentence, write_conll
from train.data.tagged import tagged_texts
from train.ner_config import NerDataConfig, NerRun, TaggerConfig
from train.runtime.config import resolve, to_dict
from train.runtime.run_folder import RunFolder
from train.settings import OptimizerConfig

NAMES, PLACES = ("Anna", "Bob", "Carl", "Dora"), ("Rome", "Oslo", "Lima", "Bonn")
SECONDS = ("selection_seconds", "training_seconds")


def sentences(count, seed):
    r, found = np.random.default_rng(seed), []
    for i in range(count):
        name, place = NAMES[r.integers(4)], PLACES[r.integers(4)]
        words = [(name, "B-PER"), ("sees", "O"), (place, "B-LOC"), (f"w{r.integers(9)}", "O"), ("today", "O"),
                 ("again", "O")][:int(r.integers(2, 7))]
        if i % 4 == 0:
            words = [("it", "O"), (f"w{r.integers(9)}", "O"), (f"v{i}", "O")]
        found.append(Sentence(*zip(*words, strict=True)))
    return found


def config(path, **changes):
    protocol = ProtocolConfig(init="20%", words="15%", rounds=3, first_epochs=4, epochs=2, least_steps=6, passes=3)
    return StudyConfig(
        data=NerDataConfig(path=str(path), length=16, batch=4), strategies=("random", "mnlp"), seeds=2,
        model=TaggerConfig(d_char=6, char_filters=8, d_word=10, word_filters=12, word_width=3, d_hidden=8, d_tag=4,
                           dropout=0.2, chars=8),
        optimizer=OptimizerConfig(learning_rate=2e-2, schedule="constant", warmup=0.0, clip=5.0),
        reference_epochs=4, **{"protocol": protocol} | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    for part, count, seed in (("train", 60, 0), ("dev", 4, 1), ("test", 16, 2)):
        write_conll(root / "data" / f"{part}.conll", sentences(count, seed))
    cfg = config(root / "data")
    with RunFolder(root / "run", {}) as folder:
        study.run(cfg, folder)
        results = folder.results()
    source = tagged_texts(cfg.data.name)
    start = ner.starting_tagger(NerRun(data=cfg.data, model=cfg.model), source, folder)
    return cfg, root / "run", results, source, start


def learner(finished, strategy="mnlp", folder=None, **changes):
    cfg, _, _, source, start = finished
    pool = [one.words for one in source.parts["train"]]
    return ActiveLearner(pool, GoldOracle(source.parts["train"]), start, strategy,
                         dataclasses.replace(cfg, **changes), test=source.parts["test"], folder=folder)


def same(records):
    return [{key: value for key, value in dataclasses.asdict(one).items() if key not in SECONDS} for one in records]


def test_sets_and_budgets(finished):
    cfg, out, _, source, _ = finished
    records, full = study.read_records(cfg, out)
    lengths = np.array([len(one) for one in source.parts["train"]])
    for seed in (0, 1):
        first = {records[name][seed][0].chosen for name in records}
        assert len(first) == 1 and records["mnlp"][seed][1].chosen != records["random"][seed][1].chosen
        for rounds in (records[name][seed] for name in records):
            chosen = [i for one in rounds for i in one.chosen]
            assert len(rounds) == 4 and len(set(chosen)) == len(chosen)
            for number, one in enumerate(rounds):
                budget = words_of("15%" if number else "20%", source.words, "")
                assert budget <= one.picked_words < budget + lengths.max()
                assert one.picked_words == lengths[list(one.chosen)].sum()
                assert one.words == lengths[chosen[:one.sentences]].sum() and one.share == one.words / source.words
        assert [one.steps for one in records["mnlp"][seed]] == [one.steps for one in records["random"][seed]]
    assert records["mnlp"][0][0].chosen != records["mnlp"][1][0].chosen
    assert full[0].words == source.words and sorted(full[0].chosen) == list(range(60))
    gold = [sum(tag[0] == "B" for tag in one.tags) for one in source.parts["train"]]
    last = records["random"][0][-1]
    chosen = [i for one in records["random"][0] for i in one.chosen]
    assert last.entities == sum(gold[i] for i in chosen) and last.empty == sum(not gold[i] for i in chosen)


def test_the_study_tells_and_does_nothing_twice(finished, monkeypatch):
    cfg, out, results, _, _ = finished
    records, full = study.read_records(cfg, out)
    assert results["finished"] and results["full.f1"] == np.mean([one.f1 for one in full.values()])
    assert results["mnlp.f1.seed1"] == records["mnlp"][1][-1].f1
    mine, other = ([(one.share, one.f1) for one in records[name][0]] for name in ("mnlp", "random"))
    end = min(mine[-1][0], other[-1][0])  # the last share that both have come to
    gain = np.interp(end, *zip(*mine, strict=True)) - np.interp(end, *zip(*other, strict=True))
    assert results["mnlp.gain.seed0"] == pytest.approx(gain, abs=1e-9)
    monkeypatch.setattr(ActiveLearner, "begin", lambda self: pytest.fail("trained again"))
    with RunFolder(out, {}) as folder:
        study.run(cfg, folder)


def test_more_rounds_go_on_where_fewer_ended(finished, tmp_path, monkeypatch):
    """Two rounds, then a third, as three at once; the reference has no more to learn, and keeps no state."""
    cfg, out, results, _, _ = finished

    def study_of(rounds):
        one = dataclasses.replace(cfg, strategies=("mnlp",), seeds=1,
                                  protocol=dataclasses.replace(cfg.protocol, rounds=rounds))
        with RunFolder(tmp_path / "run", to_dict(one), operational=one.operational) as folder:
            study.run(one, folder)
            return study.read_records(one, tmp_path / "run")[0]["mnlp"][0], folder.results()

    mine, whole = tmp_path / "run" / "mnlp" / "seed0", out / "mnlp" / "seed0"
    fewer, _ = study_of(2)
    assert len(fewer) == 3 and (mine / "state.npz").exists()
    assert not (tmp_path / "run" / "full" / "seed0" / "state.npz").exists()
    more, told = study_of(3)
    assert same(more) == same(study.read_records(cfg, out)[0]["mnlp"][0])
    assert told["mnlp.f1"] == results["mnlp.f1.seed0"] and told["mnlp.share"] > fewer[-1].share
    assert (mine / "predictions.jsonl").read_text() == (whole / "predictions.jsonl").read_text()
    monkeypatch.setattr(ActiveLearner, "begin", lambda self: pytest.fail("trained again"))
    assert same(study_of(1)[0]) == same(more)  # fewer again: what is there stays


def test_interrupted_anywhere_it_ends_alike(finished, tmp_path, monkeypatch):
    """Stopped every few checks: while choosing, in the middle of training, while scoring."""
    cfg, out, _, _, _ = finished
    whole = study.read_records(cfg, out)[0]["mnlp"][0]
    assert same(learner(finished).run()) == same(whole)  # without a folder too
    calls, starts, records = 0, 0, None

    def check():
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            raise Interrupted("SIGTERM")

    while records is None:
        starts += 1
        with RunFolder(tmp_path / "run", {}) as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(folder, "check_stop", check)
            try:
                records = learner(finished, folder=folder).run()
            except Interrupted:
                continue
            finally:
                patch.undo()
    assert starts > 5 and same(records) == same(whole)
    (tmp_path / "run" / "state.npz").unlink()  # lost: everything is done again, alike
    with RunFolder(tmp_path / "run", {}) as folder:
        assert same(learner(finished, folder=folder).run()) == same(whole)


def test_in_lockstep_they_end_alike(finished, tmp_path):
    """The study with up to three learners to a step, stopped again and again: its sets and scores. What an interruption
    has left behind catches up."""
    cfg, out, _, _, _ = finished
    assert resolve("ner_active_learning", {"lockstep": "3"}).lockstep == 3  # that a command reaches it
    cfg = dataclasses.replace(cfg, lockstep=3)
    assert [[f"{name}{seed}" for name, seed, _ in group] for group in study.groups(cfg)] == [
        ["full0", "full1"], ["random0", "mnlp0", "random1"], ["mnlp1"]]
    calls, starts, sizes = 0, 0, set()
    several = Steps._go

    def check(self):
        nonlocal calls
        calls += 1
        if calls % 13 == 0:
            raise Interrupted("SIGTERM")

    def go(self, group, count, advance):
        sizes.add(len(group))
        assert len({one.left for one in group}) == 1 and count > 0
        return several(self, group, count, advance)

    while True:
        starts += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunFolder, "check_stop", check)
            patch.setattr(Steps, "_go", go)
            try:
                with RunFolder(tmp_path / "run", to_dict(cfg), operational=cfg.operational) as folder:
                    study.run(cfg, folder)
                break
            except Interrupted:
                continue
    assert starts > 5 and sizes == {1, 2, 3}
    for mine, whole in zip(study.read_records(cfg, tmp_path / "run"), study.read_records(cfg, out), strict=True):
        assert mine.keys() == whole.keys()
    mine, whole = (study.read_records(cfg, folder)[0] for folder in (tmp_path / "run", out))
    for name, seeds in whole.items():
        for seed, records in seeds.items():
            assert [one.chosen for one in mine[name][seed]] == [one.chosen for one in records]
            assert [one.steps for one in mine[name][seed]] == [one.steps for one in records]
            assert [one.f1 for one in mine[name][seed]] == pytest.approx([one.f1 for one in records], abs=0.02)


def test_unlike_learners_are_not_trained_together(finished):
    other = dataclasses.replace(finished[0].optimizer, learning_rate=1e-3)
    with pytest.raises(UserError, match="need one model, data"):
        run_together([learner(finished), learner(finished, optimizer=other)])


def test_what_a_round_begins_with(finished):
    one = learner(finished)
    one.run()
    trained = jax.tree.map(np.array, one.training.state["params"])
    first = jax.tree.map(np.array, one._fresh()["params"])

    def begins(**changes):
        protocol = dataclasses.replace(one.cfg.protocol, **changes)
        one.cfg = dataclasses.replace(one.cfg, protocol=protocol)
        return one._begun(4, one.training.state).state["params"]

    for params, expected in ((begins(), trained), (begins(mode="scratch"), first),
                             (begins(mode="shrink_perturb", shrink=0.5, perturb=0.0),
                              jax.tree.map(lambda a: a / 2, trained))):
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    noisy = np.array(begins(shrink=1.0, perturb=0.1)["words"]["embed"]) - trained["words"]["embed"]
    assert 0.08 < noisy.std() < 0.12


def test_every_strategy_keeps_its_budget_and_repeats_itself(finished):
    _, _, _, source, start = finished
    pool = [one.words for one in source.parts["train"]]
    available = np.arange(len(pool)) >= 20
    for name in STRATEGIES:
        a, b = (strategies.choose(name, start, pool, 30, available=available, seed=3, passes=3, overshoot=False)
                for _ in range(2))
        assert a.tolist() == b.tolist() and len(set(a)) == len(a) and a.min() >= 20
        assert 24 < sum(len(pool[i]) for i in a) <= 30


@pytest.mark.parametrize("name", strategies.PER_SENTENCE)
def test_a_sentence_of_5000_words_does_not_make_the_others_as_long(name):
    """The arrays of 4,000 short sentences padded to it are 80 MB of float32, and twice that of float64."""
    lengths = np.array([3] * 4000 + [5000])
    tagged = [Tagged([], np.full(n, -0.5, np.float32), np.full(n, 0.25, np.float32), 0.0) for n in lengths]
    tracemalloc.start()
    try:
        found = strategies.scores(name, SimpleNamespace(tag=lambda *_, **__: tagged), [["w"] * n for n in lengths])
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()
    whole = {"lc": 0.5 * lengths, "mnlp": np.full(4001, 0.5), "entropy": np.full(4001, 0.25),
             "entropy_sum": 0.25 * lengths}[name]
    np.testing.assert_allclose(found, whole)


def test_the_reference_is_trained_for_longer_than_a_learner():
    """Of the default protocol, in steps over all rounds."""
    cfg = StudyConfig()
    steps = {}
    for name, _, one in study.learners(dataclasses.replace(cfg, seeds=1, strategies=("mnlp",))):
        a, b = (words_of(text, 118_170, "") for text in (one.protocol.init, one.protocol.words))
        steps[name] = one.protocol.first_epochs * a + sum(one.protocol.epochs * (a + number * b)
                                                          for number in range(1, one.protocol.rounds + 1))
    assert steps["full"] > 1.9 * steps["mnlp"]


def test_the_pool_may_end(finished):
    protocol = dataclasses.replace(finished[0].protocol, init="60%", words="50%", rounds=9)
    records = learner(finished, "random", protocol=protocol).run()
    assert len(records) == 2 and records[-1].share == 1


def test_people_are_asked(finished, tmp_path):
    _, _, _, source, _ = finished
    gold = source.parts["train"]
    oracle = FileOracle(tmp_path / "labels", [one.words for one in gold])
    with pytest.raises(UserError, match=r"3 of 3 sentences are not labelled yet"):
        oracle.labels([1, 2, 4])
    rows = [json.loads(line) for line in (tmp_path / "labels" / "batch.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [" ".join(gold[i].words) for i in (1, 2, 4)]
    for row, i in zip(rows, (1, 2, 4), strict=True):
        words = row["text"].split(" ")
        row["entities"] = [[row["text"].index(word), row["text"].index(word) + len(word), tag[2:]]
                           for word, tag in zip(words, gold[i].tags, strict=True) if tag != "O"]
    (tmp_path / "labels" / "done.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [tuple(tags) for tags in oracle.labels([4, 1, 2])] == [gold[i].tags for i in (4, 1, 2)]
    with pytest.raises(UserError, match="1 of 2 sentences"):
        oracle.labels([2, 7])


def test_a_batch_that_was_labelled_in_place_is_not_written_over(tmp_path):
    oracle, path = FileOracle(tmp_path, [("Bob", "sleeps"), ("Ann", "runs")]), tmp_path / "batch.jsonl"
    with pytest.raises(UserError, match="2 of 2 sentences"):
        oracle.labels([0, 1])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["entities"] = [[0, 3, "PER"]]
    path.write_text(text := "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="batch.jsonl has labels, and would be written over"):
        oracle.labels([0, 1])
    assert path.read_text() == text
    (tmp_path / "done.jsonl").write_text(text)
    assert oracle.labels([0, 1]) == [["B-PER", "O"], ["O", "O"]]
    with pytest.raises(UserError, match="done.jsonl:1: type 'PER' is not one of this study's, .*: LOC; rename it"):
        FileOracle(tmp_path, oracle.pool, ("LOC",)).labels([1, 0])
    (tmp_path / "done.jsonl").write_text(text.splitlines()[0])  # a copy of what the batch has labels of
    with pytest.raises(UserError, match="1 of 2 sentences"):
        oracle.labels([0, 1])


def test_a_text_that_the_pool_has_twice_is_asked_once(tmp_path):
    oracle = FileOracle(tmp_path, [("Bob", "sleeps")] * 2)
    with pytest.raises(UserError, match="2 of 2 sentences"):
        oracle.labels([0, 1])
    assert len((tmp_path / "batch.jsonl").read_text().splitlines()) == 1
    (tmp_path / "batch.jsonl").rename(tmp_path / "done.jsonl")
    assert oracle.labels([0, 1]) == [["O", "O"]] * 2


def test_curves():
    curve = np.array([0.02, 0.06, 0.10]), np.array([0.30, 0.50, 0.70])
    assert curves.share_to(curve, 0.6) == pytest.approx(0.08) and curves.share_to(curve, 0.71) is None
    assert curves.share_to(curve, 0.2) == 0.02 and curves.f1_at(curve, 0.04) == pytest.approx(0.4)
    assert curves.f1_at(curve, 0.2) is None and curves.area(curve) == pytest.approx(0.5)
    assert curves.area(curve, 0.04, 0.06) == pytest.approx(0.45)

    records = two_strategies(curve[0])
    each, by = curves.summaries(records, 0.7)
    assert [row["gain"] for row in each if row["strategy"] == "mnlp"] == pytest.approx([0.2, 0.21, 0.22])
    mnlp = next(row for row in by if row["strategy"] == "mnlp")
    assert mnlp["to_95_seeds"] == 3 and mnlp["gain"] == pytest.approx(0.21) and mnlp["gain_sd"] == pytest.approx(0.01)
    assert next(row for row in by if row["strategy"] == "random")["to_95"] is None
    assert [row["jaccard"] for row in curves.overlap(records)] == pytest.approx([0, 1 / 3])
    assert [row["gain_at_5"] for row in each if row["strategy"] == "mnlp"] == pytest.approx([0.075] * 3)
    assert mnlp["gain_at_10"] == pytest.approx(0.21) and mnlp["gain_at_10_sd"] == pytest.approx(0.01)
    assert not [key for row in each for key in row if key.startswith("gain_at_") and key not in ("gain_at_5",
                                                                                               "gain_at_10")]
    verdicts = {row["name"]: row["verdict"] for row in report.statements(records, 0.7)}
    assert verdicts == {"gain.mnlp": OPEN, "words.mnlp": YES, "density": NO, "paper": OPEN}


def two_strategies(shares, random=(0.3, 0.4, 0.5)):
    """mnlp gains 0, 10 and 20 to 22 points over random at three shares, in three seeds."""
    def rounds(f1s, chosen):
        return [RoundRecord(i, 10 * i, s, 1, 1, 0, 10, 2, 3, 1, (c,), 5, 0.0, 0.0, f, f, f, {"A": f})
                for i, (s, f, c) in enumerate(zip(shares, f1s, chosen, strict=True))]

    return {"random": {s: rounds(random, (0, 1, 2)) for s in range(3)},
            "mnlp": {s: rounds((0.3, 0.5, 0.7 + s / 100), (0, 2, 3)) for s in range(3)}}


def test_gains_are_judged_at_22_percent_of_the_words():
    """Not at the last round; and not at all by curves that end before."""
    def judged_(shares, random):
        row = {row["name"]: row for row in report.statements(two_strategies(shares, random), 0.7)}["gain.mnlp"]
        assert "At 22 % of the words" in row["claim"]
        return row["verdict"], row["why"]

    assert judged_((0.02, 0.22, 0.4), (0.3, 0.4, 0.75)) == (
        YES, "F1 above random there: +0.100, +0.100, +0.100")  # the gain at the end is below 0
    assert judged_((0.02, 0.22, 0.4), (0.3, 0.48, 0.5)) == (NO, "F1 above random there: +0.020, +0.020, +0.020")
    verdict, why = judged_((0.02, 0.1, 0.2), (0.3, 0.4, 0.5))
    assert verdict == OPEN and "not reached" in why


def test_verdicts():
    assert [judged(gaps, "")[0] for gaps in ([1, 2, 3], [-1, -2, 0], [1, 1, -1], [1, 2], [1, None, 1], [])] == [
        YES, NO, OPEN, OPEN, OPEN, OPEN]


def test_an_unfinished_study_claims_nothing_by_rounds_that_are_missing():
    """Random choice is ahead: MNLP has not come as far yet, and may reach its goal sooner; nor has it picked more."""
    records = two_strategies((0.02, 0.22, 0.4), random=(0.3, 0.4, 0.7))
    records["mnlp"] = {seed: rounds[:2] for seed, rounds in records["mnlp"].items()}
    verdicts = {row["name"]: row for row in report.statements(records, 0.7)}
    assert verdicts["words.mnlp"]["verdict"] == OPEN and "more than 22.0 % against" in verdicts["words.mnlp"]["why"]
    records = {"random": records["random"], "mnlp": {seed: rounds[:1] for seed, rounds in records["mnlp"].items()}}
    records |= {"lc": records["random"], "bald": records["random"], "bald_decoder": {
        seed: rounds[:2] for seed, rounds in records["random"].items()}}
    verdicts = {row["name"]: row["verdict"] for row in report.statements(records, 0.7)}
    assert verdicts["density"] == verdicts["length"] == OPEN
    assert verdicts["decoder"] == YES  # after the last round of both they are alike


def test_a_goal_that_the_first_set_reaches_says_nothing_of_choices():
    records = two_strategies((0.02, 0.22, 0.4), random=(0.3, 0.4, 0.5))
    verdicts = {row["name"]: row for row in report.statements(records, 0.3)}
    assert verdicts["words.mnlp"]["verdict"] == OPEN and "2.0 % against 2.0 %" in verdicts["words.mnlp"]["why"]


def test_the_report(finished):
    cfg, out, results, _, _ = finished
    about = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(about | {"config": to_dict(cfg)}))
    page = report.build(out).read_text()
    for told in ("not decidable", "95 %", "F1 above random choice of the same seed", "entities in 100 words",
                 "Jaccard", "mnlp", "LOC", "calibration error", "an end wrong", "Underlined", "seconds of choosing"):
        assert told in page
    assert 0 < max(figure_widths(page)) < 360  # pixels: what a phone shows without scrolling
    assert f"{results['full.f1']:.4g}" in page


def figure_widths(page):
    return [float(width) for width in re.findall(r"--width: ?([0-9.]+)px", page)]


def test_parts_of_a_taggers_report():
    rows = [{"words": ["Anna", "Lee", "sees", "Oslo"], "truth": [[0, 2, "PER"], [3, 4, "LOC"]],
             "said": [[0, 1, "PER", 0.9], [3, 4, "LOC", 0.6]], "confidence": 0.5}]
    kinds, pairs = ner_report.error_counts(rows)
    assert kinds == {"boundary": 1} and pairs == {("LOC", "LOC"): 1, ("PER", "PER"): 1}
    p, right = ner_report.events(rows)
    assert p.tolist() == [0.9, 0.6] and right.tolist() == [False, True]
    pieces, values, marked = ner_report.highlighted(rows[0])
    assert "".join(pieces) == "Anna [PER] Lee (true: PER) sees Oslo [LOC] "
    assert [pieces[i] for i in sorted(marked)] == ["Anna", "Lee", "Oslo"]
    assert dict(zip(pieces, values, strict=True))["Anna"] == 0.9


def test_examples_of_many_sentences():
    """Errors first, the surest of them at the top."""
    rows = [{"words": ["w"] * 50, "truth": [[0, 1, "X"]], "said": [[0, 1 + i % 2, "X", 0.5]], "confidence": i / 6000}
            for i in range(6000)]
    told = []
    page = SimpleNamespace(section=lambda *_: None, coloured=lambda *of: told.append(of[2]))
    ner_report.examples_section(page, rows)
    assert told[:2] == ["confidence of the whole: 1.00"] * 2 and told[-1] == "confidence of the whole: 0.00"
    assert len(told) == ner_report.EXAMPLES


def test_the_report_of_one_tagger(tmp_path):
    rows = [{"words": ["Anna", "sees", "Oslo"], "truth": [[0, 1, "PER"], [2, 3, "LOC"]],
             "said": [[0, 1, "LOC", 0.7], [2, 3, "LOC", 0.9]], "confidence": 0.5}] * 3
    files = {"config.json": [{"name": "ner", "config": {"data": {"source": "bc5cdr", "limit": None}}}],
             "results.json": [{"status": "complete", "test.f1": 0.5, "test.f1_low": 0.4, "test.f1_high": 0.6,
                               "test.spacy.f1": 0.7, "test.beam_4.f1": 0.51}],
             "metrics.jsonl": [{"step": 1, "loss": 2.0, "bad": 0}, {"step": 2, "loss": 1.0, "dev_f1": 0.5}],
             "predictions.jsonl": rows}
    for name, lines in files.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = ner_report.build(tmp_path).read_text()
    for told in ("0.400 to 0.600", "feature CRF", "spaCy&#39;s CNN", "beam of 4", "type wrong, both ends right",
                 "calibration error", "[LOC]", "(true: PER)", "loss over steps", "dev_f1 over steps"):
        assert told in page
    assert "bad over steps" not in page and 0 < max(figure_widths(page)[:2]) < 360


@pytest.mark.parametrize("overrides, told", [
    (["strategies=mnpl"], "mnlp"),
    (["protocol.words=lots"], "neither a share"),
    (["protocol.words=0%"], "at least 1"),
    (["optimizer.schedule=cosine"], "constant"),
    (["model.head=crf", "strategies=bald_decoder"], "crf"),
    (["oracle=labels"], "seeds=1"),
    (["known_f1=80"], "at most 1"),
])
def test_bad_settings(overrides, told):
    with pytest.raises(UserError, match=told):
        resolve("ner_active_learning", overrides)


def test_the_presets_and_what_the_issue_writes():
    assert resolve("ner_active_learning", ["data.source=craft", "strategies=mnlp"]).strategies == ("mnlp",)
    assert resolve("ner_active_learning", ["preset=paper"]).protocol.rounds == 54
    with pytest.raises(UserError, match="no sentence with words"):
        ActiveLearner([], None, None, "random", StudyConfig(), test=[])
