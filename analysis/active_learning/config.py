"""What the study can be told. ``jaxmodels run ner_active_learning --help`` lists it; configs/ holds the presets."""

import dataclasses
from typing import Literal

from jaxmodels.errors import UserError
from train.ner_config import NerDataConfig, TaggerConfig, VectorsConfig
from train.settings import OptimizerConfig

STRATEGIES = {
    "random": "drawn",
    "lc": "least confidence: the least likely tag sequence",
    "mnlp": "the least likely tag sequence, a word (Shen et al. 2018)",
    "entropy": "mean entropy of the words' tags",
    "entropy_sum": "summed entropy of the words' tags",
    "bald": "disagreement of passes with dropout, votes (Shen et al. 2018)",
    "bald_decoder": "the same with dropout in the decoder alone: the encoder runs once",
    "bald_mi": "mutual information of tags and dropout masks",
    "sequence": "how few passes agree on the commonest whole sequence",
    "submod": "facility location among the most doubtful by MNLP, four times the budget (Wei et al. 2015)",
    "k_means_pp": "spread out by k-means++, mean word embeddings",
    "core_set": "farthest from what is labelled, mean word embeddings",
}
FULL = "full"  # the reference: the same model on all labels


def words_of(text: str, total: int, name: str) -> int:
    """``2%`` of the pool's words, or ``20000`` words. Raises UserError for anything else, and for less than one."""
    try:
        value = round(float(text[:-1]) / 100 * total) if text.endswith("%") else int(text)
    except (ValueError, OverflowError):
        raise UserError(f"{name}={text!r} is neither a share like 2% nor a number of words; write one") from None
    if value < 1:
        raise UserError(f"{name}={text} is {value} of the pool's {total} words; it must be at least 1")
    return min(value, total)


@dataclasses.dataclass(frozen=True)
class ProtocolConfig:
    """How labels are bought and used (ner_active_learning.md section 6). Budgets are words: 2%, or 20000."""

    init: str = "2%"  # drawn, the same for every strategy of a seed
    words: str = "4%"  # of each round
    rounds: int = 6  # after the first set; fewer where the pool ends, and more may be asked for later
    overshoot: bool = True  # the last sentence of a round may exceed the budget; false: one that fits is taken
    mode: Literal["warm", "scratch", "shrink_perturb"] = "warm"  # what a round's training begins with
    first_epochs: float = 40.0  # passes over the first set: too few, and the scores of round 1 are noise
    epochs: float = 20.0  # passes over the grown set in each round; the steps are those of the budget, for all alike
    least_steps: int = 300  # of a round
    passes: int = 10  # with dropout, for bald, bald_decoder, bald_mi and sequence
    shrink: float = 0.6  # shrink_perturb: weights are multiplied by this (Ash & Adams 2020, arXiv 1910.08475)
    perturb: float = 0.01  # and noise of this standard deviation is added

    def __post_init__(self):
        for name, low in (("rounds", 0), ("least_steps", 1), ("passes", 1)):
            if getattr(self, name) < low:
                raise UserError(f"protocol.{name}={getattr(self, name)} must be at least {low}")
        for name in ("first_epochs", "epochs"):
            if not getattr(self, name) > 0:
                raise UserError(f"protocol.{name}={getattr(self, name)} must be above 0")
        if not 0 <= self.shrink <= 1 or self.perturb < 0:
            raise UserError(f"protocol.shrink={self.shrink} must lie in 0..1 and perturb={self.perturb} be at least 0")
        for name in ("init", "words"):
            words_of(getattr(self, name), 10 ** 9, f"protocol.{name}")


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Strategies x seeds on the training part of a source, scored on its test part. No development part is used."""

    data: NerDataConfig = NerDataConfig(source="bc5cdr", batch=4)
    model: TaggerConfig = TaggerConfig()
    vectors: VectorsConfig = VectorsConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup=0.0, beta2=0.999,
                                                 weight_decay=1e-4, clip=5.0)
    protocol: ProtocolConfig = ProtocolConfig()
    strategies: tuple[str, ...] = ("random", "lc", "mnlp", "bald")
    seeds: int = 3
    # Passes over all labels by the same model, what 95 % and 99 % are of; 0: none. `ner` was best after 27 to 45, and a
    # learner of the default protocol takes the steps of 20 in sum: a reference of 20 would flatter its shares.
    reference_epochs: float = 40.0
    known_f1: float | None = None  # of the best known system, 0..1: words to 95 % and 99 % of it are told too
    lockstep: int = 1  # learners that are trained in lockstep, a step for all: for a GPU or TPU that one does not fill
    oracle: str = "gold"  # or a folder where people put their exports: see analysis/active_learning/oracle.py
    seed: int = 0
    entry: str = "analysis.active_learning.study:run"
    report: str = "analysis.active_learning.report:build"

    def __post_init__(self):
        if not self.strategies or len(set(self.strategies)) < len(self.strategies):
            raise UserError(f"strategies={','.join(self.strategies)} must name some, each once")
        if unknown := [name for name in self.strategies if name not in STRATEGIES]:
            from train.runtime.config import did_you_mean

            raise UserError(f"strategies has {unknown[0]!r}; {did_you_mean(unknown[0], STRATEGIES)}")
        if self.seeds < 1 or self.reference_epochs < 0:
            raise UserError(f"seeds={self.seeds} must be at least 1 and reference_epochs={self.reference_epochs} at "
                            "least 0")
        if self.lockstep < 1:
            raise UserError(f"lockstep={self.lockstep} must be at least 1")
        if self.known_f1 is not None and not 0 < self.known_f1 <= 1:
            raise UserError(f"known_f1={self.known_f1} must be above 0 and at most 1")
        if self.optimizer.schedule != "constant":
            raise UserError(f"optimizer.schedule={self.optimizer.schedule} has an end, rounds have none; set it to "
                            "constant")
        if self.model.head == "crf" and "bald_decoder" in self.strategies:
            raise UserError("strategies has bald_decoder, which model.head=crf cannot do: it has no dropout in its "
                            "decoder; take bald")
        if self.oracle != "gold" and (len(self.strategies) > 1 or self.seeds > 1 or self.reference_epochs):
            raise UserError(f"oracle={self.oracle}: people label for one strategy and one seed, and not everything; "
                            "set strategies=mnlp seeds=1 reference_epochs=0")

    @property
    def operational(self) -> tuple[str, ...]:
        """More strategies, seeds and rounds add to a folder; they change nothing that is there."""
        return ("strategies", "seeds", "known_f1", "protocol.rounds", "lockstep")
