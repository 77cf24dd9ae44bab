"""Sizes and switches of a Llama-family decoder."""

import dataclasses

from jaxmodels.errors import UserError
from jaxmodels.layers.rotary import RopeConfig

REMAT = ("none", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable")
_CHOICES = {"norm_placement": ("pre", "post"), "qk_norm": (None, "head", "full"),
            "activation": ("silu", "gelu", "gelu_tanh", "relu")}
ROUTERS = ("softmax", "all", "oracle", "similarity", "linear", "mlp", "markers", "random")


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """How an expert feed-forward layer chooses.

    router: ``softmax`` (trained; Mixtral, Qwen3-MoE, OLMoE) or, for a dense layer that was split, one of
    jaxmodels.experts.routers' kinds, or ``all`` (every expert runs: the exact decomposition).
    top_k: experts per token. renormalise: chosen weights sum to 1 (trained routers only).
    shared: the first ``shared`` experts run for every token. block: neighbouring tokens that are routed
        together, from the start of the row. Their choice then depends on tokens that follow, so losses are not causal,
        and a cached step, which sees one token, chooses for that token alone. Both are for split layers only.
    balance_bias: the choice, not the weights, reads a bias that training moves towards equal load (softmax only).
    """

    num_experts: int
    top_k: int
    router: str = "softmax"
    renormalise: bool = True
    shared: int = 0
    block: int = 1
    balance_bias: bool = False

    def __post_init__(self):
        if self.router not in ROUTERS:
            raise UserError(f"router {self.router!r} is not one of {', '.join(ROUTERS)}")
        routed = self.num_experts - self.shared
        if self.shared < 0 or not 1 <= self.top_k <= routed:
            raise UserError(f"top_k {self.top_k} must lie in 1..{routed}, the number of routed experts "
                            f"({self.num_experts} less {self.shared} that always run)")
        if self.block < 1:
            raise UserError(f"block {self.block} must be at least 1 token")
        if self.router == "softmax" and (self.shared or self.block > 1):
            raise UserError(f"shared {self.shared} and block {self.block} are for layers that were split; a trained "
                            "router, softmax, takes shared 0 and block 1")
        if self.balance_bias and self.router != "softmax":
            raise UserError(f"balance_bias needs the trained router softmax, not {self.router}; set it to False")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. Defaults are Llama's; the named sizes cite where they come from.

    ffn_widths: hidden width F of each layer, dense; width of one expert in layers that ``expert_layers`` marks.
    windows: sliding-window length of each layer, None for full attention.
    norm_placement: ``pre`` (Llama) or ``post`` (OLMo-2: the norm follows the sub-layer, before the residual add).
    qk_norm: None, ``head`` (Qwen3) or ``full`` (OLMo-2, OLMoE). clip_qkv: projections clipped to ±value (OLMoE).
    scan_layers: equal neighbours are stacked and scanned (training); False unrolls (decoding, pruned models).
    remat: what the forward pass keeps for the backward pass: ``none`` (all) or a name of jax.checkpoint_policies.
    family: the Hugging Face ``model_type`` that this configuration is written back as.
    """

    vocab_size: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_widths: tuple[int, ...]
    activation: str = "silu"
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-5
    max_positions: int = 2048
    windows: tuple[int | None, ...] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    down_bias: bool = False
    qk_norm: str | None = None
    norm_placement: str = "pre"
    clip_qkv: float | None = None
    tied: bool = False
    experts: ExpertConfig | None = None
    expert_layers: tuple[bool, ...] | None = None
    family: str = "llama"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"

    def __post_init__(self):
        if self.remat not in REMAT:
            raise UserError(f"remat policy {self.remat!r} is unknown; choose from {', '.join(REMAT)}")
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise UserError(f"{field} {getattr(self, field)!r} is not one of {', '.join(map(str, choices))}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")

    @property
    def num_layers(self) -> int:
        return len(self.ffn_widths)

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and (self.expert_layers is None or self.expert_layers[layer])

    @property
    def has_down_bias(self) -> bool:
        """Whether feed-forward layers add a bias to what they put out: by the family, or by a repair."""
        return self.mlp_bias or self.down_bias

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of the runs of layers that are stacked together: equal neighbours, or single layers."""
        cuts = [0]
        for i in range(1, self.num_layers):
            equal = (self.ffn_widths[i] == self.ffn_widths[i - 1]) and (self.has_experts(i) == self.has_experts(i - 1))
            if not (equal and self.scan_layers):
                cuts.append(i)
        return tuple(zip(cuts, [*cuts[1:], self.num_layers], strict=True))

    @classmethod
    def tiny(cls, **overrides) -> "DecoderConfig":
        """Three layers that run in milliseconds: for tests and for checking an installation."""
        return dataclasses.replace(cls(vocab_size=97, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8,
                                       ffn_widths=(48,) * 3), **overrides)

    @classmethod
    def smollm2_135m(cls, **overrides) -> "DecoderConfig":
        """SmolLM2-135M (Allal et al. 2025, table of model sizes; config.json of the release)."""
        return dataclasses.replace(cls(
            vocab_size=49_152, d_model=576, num_heads=9, num_kv_heads=3, head_dim=64, ffn_widths=(1536,) * 30,
            rope=RopeConfig(theta=100_000.0), max_positions=8192, tied=True, bos_id=1, eos_ids=(2,), pad_id=2),
            **overrides)
