"""What protein pre-training can be told. ``jaxmodels run esm_pretrain --help`` lists it; configs/ holds the presets."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from jaxmodels.errors import UserError
from train.data.masking import MaskingConfig
from train.settings import LoopConfig, MeshConfig, OptimizerConfig

if TYPE_CHECKING:
    from jaxmodels.esm.config import EsmConfig


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """An encoder of ESM-2's kind: pre-norm, rotary positions, token dropout, exact GELU."""

    size: Literal["own", "esm2_8m", "esm2_35m", "esm2_150m", "esm2_650m", "esm2_3b", "esm2_15b"] = "own"  # own: below
    d_model: int = 128
    layers: int = 6
    heads: int = 4
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters and moments are float32
    remat: str = "none"  # what the forward pass keeps: none (all), nothing_saveable, dots_saveable ...
    scan: bool = True  # one compiled layer for all; false to debug
    attention: Literal["auto", "xla", "cudnn", "cudnn_packed", "triton"] = "auto"  # see jaxmodels/layers/flash.py

    def __post_init__(self):
        for name in ("d_model", "layers", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.d_model % (2 * self.heads):
            raise UserError(f"model.d_model={self.d_model} must be a multiple of 2 * model.heads = {2 * self.heads}")

    def encoder(self) -> "EsmConfig":
        """The model's own config. No contact head: nothing here trains it."""
        from jaxmodels.esm.config import EsmConfig

        options = {"contact_head": False, "dtype": self.dtype, "remat": self.remat, "scan_layers": self.scan,
                   "attention": self.attention}
        if self.size != "own":
            return getattr(EsmConfig, self.size)(**options)
        return EsmConfig(d_model=self.d_model, num_heads=self.heads, ffn_widths=(4 * self.d_model,) * self.layers,
                         **options)


@dataclasses.dataclass(frozen=True)
class ProteinDataConfig:
    """What is read."""

    source: str = "uniprot20k"  # or path:FILE, a FASTA file of your own
    length: int = 512  # tokens of a row; several proteins share one
    crop: int = 1022  # residues; longer proteins are read in pieces (and those longer than length - 2)
    batch: int = 8  # rows of a step, over all devices
    limit: int | None = None  # proteins that are read at most, for trying things out
    validation_rows: int = 256  # rows of held-out families that every evaluation reads, or all there are

    def __post_init__(self):
        for name, low in (("length", 8), ("crop", 1), ("batch", 1), ("validation_rows", 1)):
            if getattr(self, name) < low:
                raise UserError(f"data.{name}={getattr(self, name)} must be at least {low}")
        if self.limit is not None and self.limit < 2:
            raise UserError(f"data.limit={self.limit} must be at least 2, or none for all")


@dataclasses.dataclass(frozen=True)
class ProteinPretrainConfig:
    """Everything about one pre-training on proteins."""

    model: EncoderConfig = EncoderConfig()
    data: ProteinDataConfig = ProteinDataConfig()
    masking: MaskingConfig = MaskingConfig()
    # Lin et al. 2023: 4e-4, beta2 0.98, decay 0.01, for 500,000 updates; a short run of a small model wants more
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1.5e-3, beta2=0.98, weight_decay=0.01)
    mesh: MeshConfig = MeshConfig()
    loop: LoopConfig = LoopConfig(steps=3000, evaluate_every=500, save_every=250)
    seed: int = 0
    entry: str = "train.protein_pretrain:run"
    report: str = "analysis.training_report:build"
    plan: str = "train.protein_pretrain:plan_step"  # what `jaxmodels compile` compiles

    @property
    def operational(self) -> tuple[str, ...]:
        """Keys with which a run may be continued in its folder: they change how it runs, not what it computes."""
        return operational(self.loop)


def operational(loop: LoopConfig) -> tuple[str, ...]:
    """The mesh, and the keys of a loop that change how a run is carried out."""
    keys = ("style", "save_every", "keep", "keep_every", "local_dir", "local_every", "verify", "on_change",
            "max_bad_steps", "profile", "log_ids", "wandb")
    changed_data = ("data", "seed") if loop.on_change != "raise" else ()  # asked for by name
    return ("mesh", *(f"loop.{key}" for key in keys), *changed_data)
