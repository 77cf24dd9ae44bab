"""The study: every strategy with every seed, and the same model on all labels. Any interruption costs a minute at most.

    STRATEGY/seedN/   a run folder of its own: a line a round in metrics.jsonl, model/, predictions.jsonl
    full/seedN/       the reference
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from analysis.active_learning import curves
from analysis.active_learning.config import FULL, StudyConfig
from analysis.active_learning.learner import ActiveLearner, RoundRecord, run_together
from analysis.active_learning.oracle import FileOracle, GoldOracle, Oracle
from jaxmodels.cnn_cnn_lstm.tagger import Tagger
from train import entity_metrics, ner, tag_confidence
from train.data.tagged import TaggedTexts, tagged_texts
from train.ner_config import NerRun
from train.runtime.config import to_dict
from train.runtime.run_folder import RunFolder, read_metrics

Records = dict[str, dict[int, list[RoundRecord]]]  # by strategy and seed


def run(cfg: StudyConfig, folder: RunFolder) -> None:
    """Runs or finishes the study in a run folder."""
    source = tagged_texts(cfg.data.name, illformed=cfg.data.illformed, limit=cfg.data.limit)
    pool = [one.words for one in source.parts["train"]]
    oracle = GoldOracle(source.parts["train"]) if cfg.oracle == "gold" else FileOracle(cfg.oracle, pool, source.types)
    folder.write_results({f"data.{name}": value for name, value in source.counts.items()}
                         | {"pool_words": source.words, "pool_sentences": len(pool),
                            "device": jax.devices()[0].device_kind})
    starts: dict[int, Tagger] = {}  # by seed: the tagger before training
    with folder.progress(sum(one.protocol.rounds + 1 for *_, one in learners(cfg)), "rounds") as advance:
        for group in groups(cfg):
            with contextlib.ExitStack() as opened:
                some = []
                for name, number, one in group:
                    inner = opened.enter_context(folder.stage(f"{name}/seed{number}", to_dict(one), cfg.operational))
                    if number not in starts:
                        starts[number] = ner.starting_tagger(NerRun(data=cfg.data, model=cfg.model, vectors=cfg.vectors,
                                                                    seed=cfg.seed + number), source, folder)
                    some.append(_learner(one, inner, name, cfg.seed + number, pool, oracle, starts[number], source,
                                         advance))
                busy = [one for one in some if one]
                run_together(busy)
                for learner in busy:
                    _told(learner, source, advance)
            folder.write_results(numbers(cfg, folder.dir))
            folder.check_stop()
    folder.write_results({"finished": True})


def groups(cfg: StudyConfig) -> list[list[tuple[str, int, StudyConfig]]]:
    """Of `learners`, those that are trained together: references by themselves, whose only round is a long one."""
    plan = list(learners(cfg))
    if cfg.lockstep == 1:
        return [[one] for one in plan]
    kinds = [[one for one in plan if (one[0] == FULL) == full] for full in (True, False)]
    return [kind[at:at + cfg.lockstep] for kind in kinds for at in range(0, len(kind), cfg.lockstep)]


def learners(cfg: StudyConfig) -> Iterator[tuple[str, int, StudyConfig]]:
    """(name, number of the seed, config) of all, seed by seed; of each the reference first."""
    alone = {"seeds": 1, "strategies": ("random",)}
    for number in range(cfg.seeds):
        if cfg.reference_epochs:
            whole = dataclasses.replace(cfg.protocol, init="100%", rounds=0, first_epochs=cfg.reference_epochs)
            yield FULL, number, dataclasses.replace(cfg, protocol=whole, **alone)
        for name in cfg.strategies:
            yield name, number, dataclasses.replace(cfg, **alone | {"strategies": (name,)})


def _learner(cfg: StudyConfig, folder: RunFolder, name: str, seed: int, pool: list, oracle: Oracle, start: Tagger,
             source: TaggedTexts, advance: Any) -> ActiveLearner | None:
    """One that has something to do."""
    done = folder.metrics()
    if folder.results().get("finished") and (len(done) > cfg.protocol.rounds or done[-1]["words"] == source.words):
        advance(cfg.protocol.rounds + 1)
        return None
    folder.write_results({"finished": False})  # more rounds: what it says of its end is of an earlier one until then
    return ActiveLearner(pool, oracle, start, cfg.strategies[0], cfg, test=source.parts["test"], seed=seed,
                         folder=folder,
                         told=lambda record: advance(1, f"{name} {record.share:.0%} F1 {record.f1:.3f}"))


def _told(learner: ActiveLearner, source: TaggedTexts, advance: Any) -> None:
    """Writes what a learner ended with."""
    test, folder, records = source.parts["test"], learner.folder, learner.records
    advance(max(learner.cfg.protocol.rounds + 1 - len(records), 0))  # of a pool that has ended before
    tagger = learner.tagger()
    tagger.save(folder.dir / "model", overwrite=True)
    found = learner.tag_test(tagger)
    ner.write_predictions(folder.path("predictions.jsonl"), test, found, tagger)
    truth = [one.tags for one in test]
    low, high = entity_metrics.f1_interval(truth, [one.tags for one in found], seed=learner.seed)
    folder.write_results(
        entity_metrics.entity_scores(truth, [one.tags for one in found]) | {"f1_low": low, "f1_high": high}
        | tag_confidence.numbers(truth, found, tagger.calibration) | {"finished": True})
    if records[-1].words == source.words:  # else more rounds may be asked for, and go on from it
        (folder.dir / "state.npz").unlink(missing_ok=True)


def read_records(cfg: StudyConfig, folder: Path) -> tuple[Records, dict[int, RoundRecord]]:
    """(rounds of every strategy and seed that has any, the reference by seed) of a finished or unfinished study."""
    records: Records = {name: {} for name in cfg.strategies}
    full: dict[int, RoundRecord] = {}
    for name, number, _ in learners(cfg):
        found = [RoundRecord.of(line) for line in read_metrics(folder / name / f"seed{number}")]
        if found and name == FULL:
            full[number] = found[-1]
        elif found:
            records[name][number] = found
    return {name: seeds for name, seeds in records.items() if seeds}, full


def numbers(cfg: StudyConfig, folder: Path) -> dict[str, Any]:
    """Flat results: ``full.f1``; ``STRATEGY.KEY``, its ``_sd`` over seeds, ``STRATEGY.KEY.seedN``."""
    records, full = read_records(cfg, folder)
    f1 = [one.f1 for one in full.values()]
    out: dict[str, Any] = {f"full.f1.seed{number}": one.f1 for number, one in full.items()}
    if f1:
        out |= {"full.f1": float(np.mean(f1)), "full.f1_sd": float(np.std(f1, ddof=1)) if len(f1) > 1 else None}
    each, by_strategy = curves.summaries(records, out.get("full.f1"), cfg.known_f1)
    for row in by_strategy:
        out |= {f"{row['strategy']}.{key}": value for key, value in row.items() if key != "strategy"}
    for row in each:
        out |= {f"{row['strategy']}.{key}.seed{row['seed']}": value for key, value in row.items()
                if key not in ("strategy", "seed")}
    for name, seeds in records.items():
        for number, rounds in seeds.items():
            out[f"{name}.selection_seconds.seed{number}"] = sum(one.selection_seconds for one in rounds)
            out[f"{name}.training_seconds.seed{number}"] = sum(one.training_seconds for one in rounds)
    return out
