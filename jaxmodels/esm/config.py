"""Sizes and switches of an ESM encoder."""

import dataclasses

import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.esm.alphabet import CLS, EOS, MASK, PAD, TOKENS

REMAT = ("none", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable", "products_saveable",
         "everything_saveable")
ATTENTION = ("auto", "xla", "cudnn", "cudnn_packed", "triton")
_CHOICES = {"norm_placement": ("pre", "post"), "position": ("rotary", "learned"), "pool": ("mean", "cls"),
            "rope_inv_freq": ("checkpoint", "exact"), "family": ("esm", "roberta"), "remat": REMAT,
            "attention": ATTENTION}


@dataclasses.dataclass(frozen=True)
class EsmConfig:
    """A bidirectional encoder. Defaults are ESM-2's; the named sizes cite where they come from.

    norm_placement: ``pre`` (ESM-2, ESM-1b: each sub-layer reads a norm, one more follows the last layer) or ``post``
        (RoBERTa: a norm follows each residual add, none follows the last layer).
    position: ``rotary`` (ESM-2) or ``learned`` (a table of ``max_positions`` rows; the first token of a protein has row
        pad_id + 1, padding row pad_id, as in RoBERTa).
    embed_norm: a norm on the embeddings (ESM-1b, RoBERTa). token_dropout: rows of <mask> are zero and the others grow
        to make up for them (ESM-2, section "Token dropout" of facebookresearch/esm, also at inference).
    rope_inv_freq: ``checkpoint`` turns by the frequencies that the checkpoint stored (``inv_freq``, radians a position;
        the released ones are rounded to float16, and the weights are used to that), ``exact`` by computed ones.
    lm_head, contact_head: whether the model has them. classes: of the sequence classifier, 0 for none; pool: what it
        reads, the ``mean`` over residues (no <cls>, <eos>, padding) or the ``cls`` token, as transformers does.
    ffn_widths, scan_layers, remat: as in DecoderConfig; ``products_saveable`` also keeps what fused attention gives.
    attention: see jaxmodels/layers/flash.py. ``auto`` is cuDNN's on an NVIDIA GPU in half precision, else XLA's.
    family: the Hugging Face ``model_type`` that this configuration is written back as.
    """

    d_model: int
    num_heads: int
    ffn_widths: tuple[int, ...]
    vocab_size: int = len(TOKENS)
    norm_placement: str = "pre"
    position: str = "rotary"
    embed_norm: bool = False
    token_dropout: bool = True
    norm_eps: float = 1e-5
    max_positions: int = 1026
    rope_theta: float = 10_000.0
    rope_inv_freq: str = "checkpoint"
    inv_freq: tuple[float, ...] | None = None
    lm_head: bool = True
    contact_head: bool = True
    classes: int = 0
    pool: str = "mean"
    family: str = "esm"
    cls_id: int = CLS
    pad_id: int = PAD
    eos_id: int = EOS
    mask_id: int = MASK
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    attention: str = "auto"

    windows = None  # no layer has one (read by the code that runs layers)

    def __post_init__(self):
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise UserError(f"{field} {getattr(self, field)!r} is not one of {', '.join(choices)}")
        if self.d_model % self.num_heads:
            raise UserError(f"d_model {self.d_model} is not a multiple of num_heads {self.num_heads}")
        if self.position == "rotary" and self.head_dim % 2:
            raise UserError(f"a head of width {self.head_dim} is odd, and rotary positions turn pairs; choose d_model "
                            f"and num_heads with an even quotient, not {self.d_model} and {self.num_heads}")
        if self.inv_freq is not None and len(self.inv_freq) != self.head_dim // 2:
            raise UserError(f"inv_freq has {len(self.inv_freq)} frequencies; heads of width {self.head_dim} need "
                            f"{self.head_dim // 2}")
        if self.classes < 0:
            raise UserError(f"classes {self.classes} must be 0 (no classifier) or more")

    @property
    def num_layers(self) -> int:
        return len(self.ffn_widths)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of the runs of layers that are stacked together: equal neighbours, or single layers."""
        widths = self.ffn_widths
        cuts = [0, *(i for i in range(1, len(widths)) if widths[i] != widths[i - 1] or not self.scan_layers)]
        return tuple(zip(cuts, [*cuts[1:], self.num_layers], strict=True))

    @property
    def frequencies(self) -> np.ndarray:
        """Radians a position of each pair of a head, float64[H/2]."""
        if self.inv_freq is not None and self.rope_inv_freq == "checkpoint":
            return np.asarray(self.inv_freq)
        return self.rope_theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)

    @classmethod
    def tiny(cls, **overrides) -> "EsmConfig":
        """Three layers that run in milliseconds: for tests and for checking an installation."""
        return dataclasses.replace(cls(d_model=32, num_heads=4, ffn_widths=(48,) * 3), **overrides)

    # Lin et al. 2023, doi.org/10.1126/science.ade2574, table S1; config.json of the releases.

    @classmethod
    def esm2_8m(cls, **overrides) -> "EsmConfig":
        """esm2_t6_8M_UR50D: 7,512,474 parameters."""
        return cls._size(6, 320, 20, overrides)

    @classmethod
    def esm2_35m(cls, **overrides) -> "EsmConfig":
        """esm2_t12_35M_UR50D: 33,501,394 parameters."""
        return cls._size(12, 480, 20, overrides)

    @classmethod
    def esm2_150m(cls, **overrides) -> "EsmConfig":
        """esm2_t30_150M_UR50D: 148,140,154 parameters."""
        return cls._size(30, 640, 20, overrides)

    @classmethod
    def esm2_650m(cls, **overrides) -> "EsmConfig":
        """esm2_t33_650M_UR50D: 651,043,254 parameters."""
        return cls._size(33, 1280, 20, overrides)

    @classmethod
    def esm2_3b(cls, **overrides) -> "EsmConfig":
        """esm2_t36_3B_UR50D: 2,839,005,634 parameters."""
        return cls._size(36, 2560, 40, overrides)

    @classmethod
    def esm2_15b(cls, **overrides) -> "EsmConfig":
        """esm2_t48_15B_UR50D: 15,129,100,194 parameters."""
        return cls._size(48, 5120, 40, overrides)

    @classmethod
    def _size(cls, layers: int, width: int, heads: int, overrides) -> "EsmConfig":
        return dataclasses.replace(cls(d_model=width, num_heads=heads, ffn_widths=(4 * width,) * layers), **overrides)
