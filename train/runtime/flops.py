"""Model FLOPs, peaks of devices, and MFU (training_runtime.md section 7)."""

from typing import Any

from jaxmodels.decoder.config import DecoderConfig

# Dense bf16 FLOP/s of one device, by what jax calls it (device_kind, lower case; the first that it contains).
PEAKS = {
    "h200": 989e12, "h100 nvl": 835e12, "h100 pcie": 756e12, "h100": 989e12,  # NVIDIA data sheets, no sparsity
    "a100": 312e12,  # NVIDIA A100 data sheet
    "tpu v6": 918e12, "tpu v5p": 459e12, "tpu v5 lite": 197e12, "tpu v5e": 197e12, "tpu v5": 459e12, "tpu v4": 275e12,
    # cloud.google.com/tpu/docs/system-architecture-tpu-vm, "peak compute per chip (bf16)"
}


def peak(device: Any) -> float | None:
    """Dense bf16 FLOP/s of a jax device; None for one that is not in the table (no MFU then)."""
    kind = device.device_kind.lower()
    return next((value for name, value in PEAKS.items() if name in kind), None)


def active_matmul_parameters(cfg: DecoderConfig) -> int:
    """Parameters that a token is multiplied with: top-k experts and router, the head, not the embedding look-up."""
    attention = 2 * cfg.d_model * cfg.head_dim * (cfg.num_heads + cfg.num_kv_heads)
    total = cfg.num_layers * attention + cfg.d_model * cfg.vocab_size
    for layer, width in enumerate(cfg.ffn_widths):
        ffn = 3 * cfg.d_model * width
        if cfg.has_experts(layer):
            active = cfg.experts.num_experts if cfg.experts.router == "all" else cfg.experts.top_k + cfg.experts.shared
            ffn = active * ffn + cfg.d_model * cfg.experts.num_experts
        total += ffn
    return total


def mean_keys(cfg: DecoderConfig, length: int) -> list[float]:
    """For each layer, how many keys a query sees on average in a row of `length` tokens (causality, window)."""
    def mean(window):
        w = min(window or length, length)
        return (w * (w + 1) / 2 + (length - w) * w) / length

    return [mean(window) for window in (cfg.windows or (None,) * cfg.num_layers)]


def forward_flops_per_token(cfg: DecoderConfig, length: int) -> float:
    """2 FLOPs for each active parameter, and 4·N·H for each key seen (scores and values)."""
    attention = 4 * cfg.num_heads * cfg.head_dim * sum(mean_keys(cfg, length))
    return 2 * active_matmul_parameters(cfg) + attention


def train_flops_per_token(cfg: DecoderConfig, length: int) -> float:
    """Forward and backward, 6·N + 12·L·N·H·(mean keys seen); recomputation under remat is not model work."""
    return 3 * forward_flops_per_token(cfg, length)


def encoder_train_flops_per_token(cfg: Any, keys: float) -> float:
    """Forward and backward of an ESM encoder with its masked-LM head, a token; keys: how many a query sees on average.

    3 · (24·D²·L + 4·keys·D·L + 2·D·V) for F = 4D (NVIDIA BioNeMo), and the head's square matrix, 3 · 2·D².
    """
    D, V = cfg.d_model, cfg.vocab_size
    layers = sum(8 * D * D + 4 * D * width + 4 * keys * D for width in cfg.ffn_widths)
    return 3 * (layers + 2 * D * (D + V if cfg.lm_head else 0))


def mfu(flops: float, seconds: float, devices: int, device: Any) -> float | None:
    """Share of the devices' dense bf16 peak; None for an unknown device, and for FLOPs that nobody counted, 0."""
    top = peak(device)
    return None if top is None or not flops else flops / (seconds * devices * top)
