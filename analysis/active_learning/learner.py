"""Pool-based active learning of a tagger: score the pool, buy the labels of a budget of words, train, repeat.

    records = ActiveLearner(pool, GoldOracle(sentences), start, "mnlp", config, test=test).run()

With a run folder every round is logged in its metrics.jsonl, and a learner that was interrupted anywhere goes on from
what lies there and ends with the same sets and scores:

    selected.npz   what a round has chosen, before anything is trained with it
    state.npz      weights and moments, once a minute and at the end of a round
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from analysis.active_learning import acquisition, selection, strategies
from analysis.active_learning.config import StudyConfig, words_of
from analysis.active_learning.lockstep import Batch, Round, Steps, Training
from analysis.active_learning.oracle import Oracle
from jaxmodels.cnn_cnn_lstm.tagger import Tagged, Tagger
from jaxmodels.errors import UserError
from train.data.conll import Sentence
from train.data.tagged_rows import tagged_rows
from train.entity_metrics import entity_scores
from train.objectives.tagging import Tagging
from train.optimizers import make_optimizer
from train.runtime.run_folder import RunFolder
from train.runtime.state import merge, split
from train.runtime.step import TrainStep
from train.settings import OptimizerConfig

SAVED = ("params", "rest", "opt", "step", "skipped", "bad")  # of a state; its random key is that of the seed


@dataclasses.dataclass(frozen=True)
class RoundRecord:
    """What a round has bought and what the tagger can do after it.

    words, sentences, entities, empty (sentences without entities): of all that is labelled; picked_*: of this round.
    share: words of the pool's. chosen: places in the pool, in the order of the choice. types: F1 by type.
    """

    round: int
    words: int
    share: float
    sentences: int
    entities: int
    empty: int
    picked_words: int
    picked_sentences: int
    picked_entities: int
    picked_empty: int
    chosen: tuple[int, ...]
    steps: int
    selection_seconds: float
    training_seconds: float
    precision: float
    recall: float
    f1: float
    types: dict[str, float]

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "RoundRecord":
        """From a line of metrics.jsonl."""
        values = {field.name: line[field.name] for field in dataclasses.fields(cls)}
        return cls(**values | {"chosen": tuple(line["chosen"])})


class ActiveLearner:
    """One strategy with one seed. The first set depends on the seed alone; steps of a round on the budget alone.

    pool: sentences of words, whose labels only the oracle knows. model: the tagger before training, whose vocabulary
    and tags are fixed. test: sentences that every round is scored on; nothing is chosen by them. told: called with
    every finished round.
    """

    def __init__(self, pool: Sequence[Sequence[str]], oracle: Oracle, model: Tagger, strategy: str, config: StudyConfig,
                 *, test: Sequence[Sentence], seed: int = 0, folder: RunFolder | None = None,
                 told: Callable[[RoundRecord], None] = lambda record: None):
        self.pool, self.oracle, self.start, self.strategy, self.cfg = pool, oracle, model, strategy, config
        self.test, self.seed, self.folder, self.told = test, seed, folder, told
        self.lengths = np.array([len(words) for words in pool], int)
        self.total = int(self.lengths.sum())
        if not self.total:
            raise UserError("the pool has no sentence with words; give some")
        self.graphdef, self.optimizer, self.steps = _compiled(split(model.model)[0], config.optimizer)
        self.tags: dict[int, Sequence[str]] = {}  # what is labelled
        self.records: list[RoundRecord] = []
        self.training: Training | None = None  # until the first round begins

    def run(self) -> list[RoundRecord]:
        """The rounds, from the first set on; fewer than the config's where the pool ends.

        Whatever the config asks for, rounds that lie in the folder stay, and one that has begun is finished.
        """
        run_together([self])
        return self.records

    def begin(self) -> Round | None:
        """Chooses and labels what the next round buys; None after the last. Its training is the caller's, then `end`.
        """
        if self.training is None:
            self.records, self.training = self._restored()
            for record in self.records:
                self.told(record)
        number, training = len(self.records), self.training
        if number > max(self.cfg.protocol.rounds, training.round) or self._all_labelled():
            return None
        self.places, self.selection_seconds = self._selected(number, self.records, training)
        self.chosen = np.concatenate([np.array(one.chosen, int) for one in self.records] + [self.places])
        self._label(self.chosen)
        if training.round < number:
            training = self._begun(number, training.state)
        steps = self.steps_of(number)
        return Round(training, steps, self._batches(number, steps) if training.done < steps else lambda at: {},
                     self._save, self._check)

    def end(self, training: Training) -> None:
        """Scores the test sentences after a round's training, and records the round."""
        self.training = training
        record = self._record(training, self.tag_test(self.tagger()))
        if self.folder:
            self.folder.log(record.round, **dataclasses.asdict(record))
        self.records.append(record)
        self.told(record)

    def tagger(self) -> Tagger:
        """With the weights after the last training. Usable until training goes on."""
        state = self.training.state
        return Tagger(merge(self.graphdef, state["params"], state["rest"]), self.start.vocabulary, self.start.joins)

    def tag_test(self, tagger: Tagger) -> list[Tagged]:
        return tagger.tag([one.words for one in self.test], check=self._check)

    # Rounds

    def _selected(self, number: int, records: Sequence[RoundRecord], training: Training) -> tuple[np.ndarray, float]:
        """(places, seconds) of a round: what an earlier start has chosen, or a choice with the weights of the last."""
        found = self.folder.load_npz("selected") if self.folder else None
        if found is not None and int(found["round"]) == number:
            return found["places"], float(found["seconds"])
        began = time.perf_counter()
        p, seed = self.cfg.protocol, 1000 * self.seed + number
        if number == 0:
            places = selection.by_score(acquisition.random(len(self.pool), self.seed), self.lengths,
                                        words_of(p.init, self.total, "protocol.init"), seed=self.seed,
                                        overshoot=p.overshoot)
        else:
            available = np.ones(len(self.pool), bool)
            available[[i for one in records for i in one.chosen]] = False
            places = strategies.choose(self.strategy, self.tagger(), self.pool,
                                       words_of(p.words, self.total, "protocol.words"), available=available, seed=seed,
                                       passes=p.passes, overshoot=p.overshoot, check=self._check)
        seconds = time.perf_counter() - began
        if self.folder:
            self.folder.save_npz("selected", round=number, places=places, seconds=seconds)
        return places, seconds

    def _label(self, chosen: np.ndarray) -> None:
        new = [int(i) for i in chosen if int(i) not in self.tags]
        for i, tags in zip(new, self.oracle.labels(new) if new else (), strict=True):
            if len(tags) != len(self.pool[i]):
                raise UserError(f"sentence {i} of the pool has {len(self.pool[i])} words, its labels are {len(tags)}; "
                                "label it again")
            self.tags[i] = tags

    def _begun(self, number: int, state: dict[str, Any]) -> Training:
        """The state that a round's training begins with."""
        mode = self.cfg.protocol.mode
        if number == 0 or mode == "warm":
            return Training(state, number, 0, 0.0)
        fresh = self._fresh() | {name: state[name] for name in ("step", "skipped")}
        if mode == "shrink_perturb":
            key = jax.random.fold_in(jax.random.key(self.seed), number)
            fresh["params"] = _perturbed(state["params"], key, self.cfg.protocol.shrink, self.cfg.protocol.perturb)
        return Training(fresh, number, 0, 0.0)

    def _batches(self, number: int, steps: int) -> Callable[[int], Batch]:
        """The batch of each step of a round, rows of all that is labelled."""
        data, seed = self.cfg.data, 1000 * self.seed + number
        sentences = [Sentence(tuple(self.pool[i]), tuple(self.tags[int(i)])) for i in self.chosen]
        rows = tagged_rows(sentences, self.start.vocabulary, data.length, self.start.model.cfg.reach, seed)
        order = _order(len(rows["words"]), steps * data.batch, seed)
        return lambda at: {name: array[order[at * data.batch:(at + 1) * data.batch]] for name, array in rows.items()}

    def steps_of(self, number: int) -> int:
        """Of a round: passes over so many words as its budgets plan, however many sentences a strategy picks."""
        p, data, gap = self.cfg.protocol, self.cfg.data, self.start.model.cfg.reach
        words = words_of(p.init, self.total, "protocol.init") + number * words_of(p.words, self.total, "protocol.words")
        full = self.total / (self.total + len(self.pool) * (2 + gap))  # of a row's positions: words
        epochs = p.epochs if number else p.first_epochs
        return max(math.ceil(epochs * min(words, self.total) / (data.batch * data.length * full)), p.least_steps)

    def _record(self, training: Training, found: Sequence[Tagged]) -> RoundRecord:
        scores = entity_scores([one.tags for one in self.test], [one.tags for one in found])
        all_, new = (self._counts(which) for which in (self.chosen, self.places))
        return RoundRecord(
            round=training.round, words=all_["words"], share=all_["words"] / self.total,
            **{name: all_[name] for name in ("sentences", "entities", "empty")},
            **{f"picked_{name}": value for name, value in new.items()}, chosen=tuple(int(i) for i in self.places),
            steps=self.steps_of(training.round), selection_seconds=round(self.selection_seconds, 3),
            training_seconds=round(training.seconds, 3),
            **{name: scores[name] for name in ("precision", "recall", "f1")},
            types={name.removesuffix(".f1"): value for name, value in scores.items() if name.endswith(".f1")})

    def _counts(self, places: np.ndarray) -> dict[str, int]:
        entities = [sum(tag[0] == "B" for tag in self.tags[int(i)]) for i in places]
        return {"words": int(self.lengths[places].sum()), "sentences": len(places), "entities": sum(entities),
                "empty": sum(not count for count in entities)}

    # State

    def _fresh(self) -> dict[str, Any]:
        """Before any training, in arrays of its own: a step takes those of the state that it is given."""
        params, rest = jax.tree.map(jnp.copy, split(self.start.model)[1:])
        zero = np.zeros((), np.int32)
        return {"params": params, "rest": rest, "opt": self.optimizer.init(params), "step": jnp.array(zero),
                "rng": jax.random.fold_in(jax.random.key(self.seed), 1), "skipped": jnp.array(zero),
                "bad": jnp.array(zero)}

    def _save(self, training: Training) -> None:
        if self.folder:
            leaves = jax.tree.leaves({name: training.state[name] for name in SAVED})
            self.folder.save_npz("state", round=training.round, done=training.done, seconds=training.seconds,
                                 **{str(i): leaf for i, leaf in enumerate(leaves)})

    def _restored(self) -> tuple[list[RoundRecord], Training]:
        """(finished rounds, the state after them or within the next); from the beginning where files are missing."""
        fresh = self._fresh()
        training = Training(fresh, -1, 0, 0.0)
        if not self.folder:
            return [], training
        records = [RoundRecord.of(line) for line in self.folder.metrics()]
        found = self.folder.load_npz("state")
        selected = self.folder.load_npz("selected")
        number = -1 if found is None else int(found["round"])
        within = number == len(records) and selected is not None and int(selected["round"]) == number
        if number < 0 or not (number == len(records) - 1 or within):
            self.folder.truncate_metrics(-1)  # choices and training are repeated, and come out alike
            return [], training
        leaves, tree = jax.tree.flatten({name: fresh[name] for name in SAVED})
        values = [jnp.asarray(found[str(i)]) for i in range(len(leaves))]
        state = jax.tree.unflatten(tree, values) | {"rng": fresh["rng"]}
        self._label(np.array([i for one in records for i in one.chosen], int))
        return records, Training(state, number, int(found["done"]), float(found["seconds"]))

    def _check(self) -> None:
        if self.folder:
            self.folder.check_stop()

    def _all_labelled(self) -> bool:
        return bool(self.records) and self.records[-1].words == self.total


def run_together(learners: Sequence[ActiveLearner]) -> None:
    """Every learner to its last round, round by round, all in lockstep: same sets and scores as alone up to rounding.

    They differ in strategy and seed alone: model, optimizer and batches have one shape.
    """
    if len({(one.graphdef, one.cfg.data, one.cfg.optimizer) for one in learners}) > 1:
        raise UserError("learners that are trained together need one model, data.* and optimizer.*; run them alone")
    while begun := [(one, this) for one in learners if (this := one.begin())]:
        rounds, folder = [this for _, this in begun], begun[0][0].folder
        label = f"round {rounds[0].training.round}" + (f" of {len(rounds)} learners" if len(rounds) > 1 else "")
        total, done = sum(one.steps for one in rounds), sum(one.training.done for one in rounds)
        progress = folder.progress(total, label, done) if folder else contextlib.nullcontext(lambda n=1, note="": None)
        with progress as advance:
            begun[0][0].steps.train(rounds, advance)
        for learner, this in begun:
            learner.end(this.training)


@functools.lru_cache(maxsize=8)
def _compiled(graphdef: Any, optimizer: OptimizerConfig) -> tuple[Any, Any, Steps]:
    """(graphdef, optimizer, steps) of all learners of one shape: seeds and strategies share one compilation."""
    made = make_optimizer(optimizer, 1)
    return graphdef, made, Steps(TrainStep(graphdef, Tagging(), made), optimizer.learning_rate)


@jax.jit
def _perturbed(params: Any, key: jax.Array, shrink: float, perturb: float) -> Any:
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [shrink * leaf + perturb * jax.random.normal(one, leaf.shape, leaf.dtype)
                                     for leaf, one in zip(leaves, keys, strict=True)])


def _order(rows: int, count: int, seed: int) -> np.ndarray:
    """Rows of a round's batches, int[count]: pass after pass, each shuffled anew."""
    r = np.random.default_rng(seed)
    return np.concatenate([r.permutation(rows) for _ in range(-(-count // rows))])[:count]
