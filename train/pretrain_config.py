"""What pre-training can be told. ``jaxmodels run lm_moe_pretrain --help`` lists it; configs/ holds the presets."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from jaxmodels.errors import UserError
from train.settings import BalanceConfig, LoopConfig, MeshConfig, OptimizerConfig

if TYPE_CHECKING:
    from jaxmodels.decoder.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Qwen3 family, dense or with experts."""

    d_model: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    active_width: int = 768  # hidden neurons that a token uses in each layer; top_k experts share them
    experts: int = 0  # experts of a layer; 0: a dense model
    top_k: int = 2  # experts of a token
    balance_bias: bool = True  # keep experts loaded by biases that no gradient moves (see balance.*)
    tied: bool = True  # one matrix for embedding and head
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters and moments are float32
    quantize: Literal["none", "int8", "fp8"] = "none"  # products of attention and dense layers, by qwix
    remat: str = "none"  # what the forward pass keeps: none (all), nothing_saveable, dots_saveable ...
    scan: bool = True  # one compiled layer for all; false to debug

    def __post_init__(self):
        for name in ("d_model", "layers", "heads", "kv_heads", "head_dim", "active_width"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}")
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise UserError(f"model.top_k={self.top_k} must lie in 1..{self.experts} (model.experts)")
        if self.experts and self.active_width % self.top_k:
            raise UserError(f"model.active_width={self.active_width} must be a multiple of model.top_k={self.top_k}")

    def decoder(self, vocab_size: int, length: int) -> "DecoderConfig":
        """The decoder for a tokenizer and a row length."""
        from jaxmodels.decoder.config import DecoderConfig, ExpertConfig  # imports jax, which --help must not wait for
        from jaxmodels.layers.rotary import RopeConfig

        experts = ExpertConfig(self.experts, self.top_k, balance_bias=self.balance_bias) if self.experts else None
        width = self.active_width // self.top_k if self.experts else self.active_width
        return DecoderConfig(
            vocab_size, self.d_model, self.heads, self.kv_heads, self.head_dim, (width,) * self.layers,
            rope=RopeConfig(theta=10_000.0), max_positions=length, qk_norm="head", tied=self.tied, experts=experts,
            family="qwen3_moe" if experts else "qwen3", bos_id=None, eos_ids=(0,), pad_id=0, dtype=self.dtype,
            remat=self.remat, scan_layers=self.scan)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read."""

    source: str = "python"  # python: the standard library of this machine; path:DIR: text files of your own
    vocab_size: int = 4096  # of the tokenizer that is trained on the training part
    length: int = 256  # tokens of a row
    batch: int = 16  # rows of a step, over all devices
    validation_rows: int = 256  # rows of held-out packages that every evaluation reads, or all there are

    def __post_init__(self):
        for name, low in (("vocab_size", 258), ("length", 2), ("batch", 1), ("validation_rows", 1)):
            if getattr(self, name) < low:
                raise UserError(f"data.{name}={getattr(self, name)} must be at least {low}")


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Everything about one pre-training."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    balance: BalanceConfig = BalanceConfig()
    mesh: MeshConfig = MeshConfig()
    loop: LoopConfig = LoopConfig()
    samples: int = 4  # texts that the trained model writes for the report
    seed: int = 0
    entry: str = "train.pretrain:run"
    report: str = "analysis.training_report:build"
    plan: str = "train.pretrain:plan_step"  # what `jaxmodels compile` compiles

    @property
    def operational(self) -> tuple[str, ...]:
        """Keys with which a run may be continued in its folder: they change how it runs, not what it computes."""
        loop = ("style", "save_every", "keep", "keep_every", "local_dir", "local_every", "verify", "on_change",
                "max_bad_steps", "profile", "log_ids", "wandb")
        changed_data = ("data", "seed") if self.loop.on_change != "raise" else ()  # asked for by name
        return ("mesh", "samples", *(f"loop.{key}" for key in loop), *changed_data)
