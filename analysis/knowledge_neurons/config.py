"""What the study can be told. ``jaxmodels run esm_knowledge_neurons --help`` lists it; configs/ holds the presets."""

import dataclasses
from typing import Literal

from analysis.knowledge_neurons.methods import BUDGETS, MATCHED, METHODS, NEEDED
from jaxmodels.errors import UserError
from train.enzyme_config import EnzymeConfig
from train.protein_config import ProteinPretrainConfig

Baseline = Literal["zero", "mean"]


def _check_shares(name: str, shares: tuple[float, ...]) -> None:
    if wrong := [share for share in shares if not 0 < share <= 1]:
        raise UserError(f"{name} has {wrong[0]}; shares are above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """How neurons are scored, on training proteins alone."""

    length: int = 512  # tokens of a protein at most; of longer ones the beginning, here and for the curves
    tokens: int = 2048  # of a batch, about: all of it is computed again where one protein of it needs more steps
    counted: Literal["all", "residues"] = "all"  # tokens that a sum of contributions is over; residues: no <cls>, <eos>
    # paths of integrated gradients; conductance (from the embedding 0) is ranked beside the others, nothing more
    modes: tuple[Literal["gate", "site", "conductance"], ...] = ("gate", "site", "conductance")
    baselines: tuple[Baseline, ...] = ("zero", "mean")
    steps: int = 20  # Gauss-Legendre nodes
    max_steps: int = 40  # doubled up to so many where the sum misses the change by more than 1 %
    gate_examples: int | None = 8  # correctly classified proteins of each class; none: all
    site_examples: int | None = 2  # the same for `site`, which costs about 6 L times as much

    def __post_init__(self):
        for name, low in (("length", 8), ("tokens", 8), ("steps", 1)):
            if getattr(self, name) < low:
                raise UserError(f"score.{name}={getattr(self, name)} must be at least {low}")
        for name in ("gate_examples", "site_examples"):
            if getattr(self, name) is not None and getattr(self, name) < 2:
                raise UserError(f"score.{name}={getattr(self, name)} must be at least 2, one for each half, or none")
        for name, needed in (("modes", "gate"), ("baselines", "zero")):
            if needed not in getattr(self, name):
                raise UserError(f"score.{name}={','.join(getattr(self, name))} must hold {needed}, by which the "
                                "controls are chosen")


@dataclasses.dataclass(frozen=True)
class KeepConfig:
    """What is kept or lost, and on what that is tested."""

    methods: tuple[str, ...] = METHODS
    shares: tuple[float, ...] = BUDGETS  # of all neurons; the last is the whole model
    ablations: tuple[Baseline, ...] = ("zero", "mean")  # what the other neurons are set to
    seeds: int = 2  # random masks of each fine-tuning
    proteins: int | None = 24  # of each class of the test part at most; none: all
    bootstrap: int = 1000  # draws behind every interval
    specific: float = 0.05  # share of the neurons that is knocked out for one class
    retrain_shares: tuple[float, ...] = (0.1,)  # kept while the first fine-tuning is retrained for an epoch
    site_shares: tuple[float, ...] = (0.02, 0.1, 0.3)  # kept of one site, every other site being whole

    def __post_init__(self):
        if unknown := sorted(set(self.methods) - set(METHODS)):
            raise UserError(f"keep.methods has {unknown[0]!r}; choose from {', '.join(METHODS)}")
        if missing := [m for m in NEEDED if m not in self.methods and m not in MATCHED]:
            raise UserError(f"keep.methods lacks {missing[0]!r}, which the statements compare; add it")
        _check_shares("keep.shares", (*self.shares, self.specific, *self.site_shares, *self.retrain_shares))
        if len(self.shares) < 2 or list(self.shares) != sorted(set(self.shares)) or self.shares[-1] != 1:
            raise UserError(f"keep.shares={list(self.shares)} must rise, and end with 1")
        if not self.ablations:
            raise UserError("keep.ablations is empty; give zero, mean or both")
        for name, low in (("seeds", 1), ("bootstrap", 1)):
            if getattr(self, name) < low:
                raise UserError(f"keep.{name}={getattr(self, name)} must be at least {low}")
        if self.proteins is not None and self.proteins < 1:
            raise UserError(f"keep.proteins={self.proteins} must be at least 1, or none for all")


@dataclasses.dataclass(frozen=True)
class WhereConfig:
    """Where chosen neurons are."""

    shares: tuple[float, ...] = (0.01, 0.05, 0.1)  # a statement about a site must hold at all of them
    draws: int = 100  # shuffles of the labels
    motif_proteins: int = 24  # with each motif, at most
    permutations: int = 1000  # of the positions, behind every p-value

    def __post_init__(self):
        _check_shares("where.shares", self.shares)
        if not self.shares:
            raise UserError("where.shares is empty; give one at least")
        for name in ("draws", "motif_proteins", "permutations"):
            if getattr(self, name) < 1:
                raise UserError(f"where.{name}={getattr(self, name)} must be at least 1")


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The whole study: pre-train, fine-tune, score, keep, where."""

    pretrained: str = "here"  # here: pre-train as a stage; none; or a run of esm_pretrain or a model (folder, name)
    tuned: str = "here"  # here: fine-tune, a stage a seed; or runs of esm_enzyme (or models of 7 classes), by commas
    seeds: int = 3  # fine-tunings, from enzyme.seed on; not read with `tuned`
    pretrain: ProteinPretrainConfig = ProteinPretrainConfig()
    enzyme: EnzymeConfig = EnzymeConfig(settings=("strict",))
    score: ScoreConfig = ScoreConfig()
    keep: KeepConfig = KeepConfig()
    where: WhereConfig = WhereConfig()
    seed: int = 0
    entry: str = "analysis.knowledge_neurons.study:run"
    report: str = "analysis.knowledge_neurons.report:build"

    def __post_init__(self):
        if "ig_site" in self.keep.methods and "site" not in self.score.modes:
            raise UserError("keep.methods has ig_site, but score.modes lacks site; take the one out or the other in")
        if self.seeds < 1:
            raise UserError(f"seeds={self.seeds} must be at least 1")
        if self.enzyme.pretrained != "none":
            raise UserError(f"enzyme.pretrained={self.enzyme.pretrained} is not read here; set pretrained")

    @property
    def given(self) -> tuple[str, ...]:
        """Fine-tuned encoders from elsewhere; empty: they are made here."""
        return () if self.tuned == "here" else tuple(one.strip() for one in self.tuned.split(",") if one.strip())

    @property
    def fine_tunings(self) -> int:
        return len(self.given) or self.seeds

    @property
    def operational(self) -> tuple[str, ...]:
        """Keys with which a study may be continued in its folder."""
        return (*(f"pretrain.{key}" for key in self.pretrain.operational),
                *(f"enzyme.{key}" for key in self.enzyme.operational))
