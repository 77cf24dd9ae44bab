"""What enzyme classification can be told. ``jaxmodels run esm_enzyme --help`` lists it; configs/ holds the presets."""

import dataclasses
from typing import Literal

from jaxmodels.errors import UserError
from train.protein_config import EncoderConfig, operational
from train.settings import LoopConfig, MeshConfig, OptimizerConfig


@dataclasses.dataclass(frozen=True)
class EnzymeDataConfig:
    """What is read."""

    source: str = "enzyme_ec"
    length: int = 512  # tokens of a row; several proteins share one. Longer proteins are cut at length - 2 residues
    batch: int = 4  # rows of a step, over all devices: about six proteins
    limit: int | None = None  # proteins of each part that are read at most, for trying things out
    external: bool = True  # test on nrpdb_ec's identity strata and on care_task1 too, where they are here

    def __post_init__(self):
        for name, low in (("length", 8), ("batch", 1)):
            if getattr(self, name) < low:
                raise UserError(f"data.{name}={getattr(self, name)} must be at least {low}")
        if self.limit is not None and self.limit < 8:
            raise UserError(f"data.limit={self.limit} must be at least 8, or none for all")


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """How a pre-trained encoder is made to follow; a head from random weights moves at optimizer.learning_rate."""

    trunk: float = 0.5  # rate of the encoder's top, as a share of the head's; large encoders want 0.2 and less
    layer_decay: float = 0.9  # of the rate, from each layer to the one below
    pool: Literal["mean", "cls"] = "mean"  # what the head reads
    weighted: bool = True  # weigh classes by the inverse square root of their frequency
    patience: int = 8  # evaluations without a better validation macro-F1 that end the training

    def __post_init__(self):
        if not self.trunk >= 0:
            raise UserError(f"tune.trunk={self.trunk} must be at least 0")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"tune.layer_decay={self.layer_decay} must lie above 0 and not above 1")
        if self.patience < 1:
            raise UserError(f"tune.patience={self.patience} must be at least 1")


@dataclasses.dataclass(frozen=True)
class EnzymeConfig:
    """Everything about one fine-tuning."""

    pretrained: str = "none"  # a run of esm_pretrain or a model (folder, name); none: random weights of `model`
    model: EncoderConfig = EncoderConfig()  # read only without `pretrained`
    data: EnzymeDataConfig = EnzymeDataConfig()
    tune: TuneConfig = TuneConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3, schedule="cosine", beta2=0.98, weight_decay=0.01)
    settings: tuple[Literal["strict", "easy"], ...] = ("strict", "easy")  # easy: train on near_eval's homologs too
    bootstrap: int = 2000  # draws behind every interval
    mesh: MeshConfig = MeshConfig()
    loop: LoopConfig = LoopConfig(steps=1024, evaluate_every=64, save_every=128)
    seed: int = 0
    entry: str = "train.enzyme:run"
    report: str = "analysis.enzyme_report:build"

    def __post_init__(self):
        if not self.settings or len(set(self.settings)) != len(self.settings):
            raise UserError(f"settings={','.join(self.settings)} must name strict, easy or both, once each")
        if self.loop.style == "pmap":
            raise UserError("loop.style=pmap is for old scripts; esm_enzyme runs with auto or per_device")

    @property
    def operational(self) -> tuple[str, ...]:
        """Keys with which a run may be continued in its folder: they change how it runs, not what it computes."""
        return operational(self.loop)
