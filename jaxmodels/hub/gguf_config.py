"""A Hugging Face config dict from the metadata of a GGUF file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.hub.gguf_header import GgufTensor


@dataclass(frozen=True)
class Architecture:
    """model_type: Hugging Face's name; permuted: q and k rows were interleaved by llama.cpp's converter."""

    model_type: str
    class_name: str
    permuted: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True),
    "mistral": Architecture("mistral", "MistralForCausalLM", permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM"),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM"),
    "olmoe": Architecture("olmoe", "OlmoeForCausalLM"),
}
MIXTRAL = Architecture("mixtral", "MixtralForCausalLM", permuted=True)
_NEUTRAL = {  # factors of YaRN that Hugging Face's rule has no place for -> the values that change nothing
    "attn_factor": (1.0,), "yarn_attn_factor": (1.0, -1.0), "yarn_ext_factor": (1.0, -1.0),
    "yarn_log_multiplier": (0.0,),
}
MISTRAL = ARCHITECTURES["mistral"]


def hf_config(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], rope_factors: np.ndarray | None
) -> dict[str, Any]:
    """The config.json that `transformers` would have for this file, in the 4.x spelling (rope_theta, rope_scaling).

    rope_factors: the tensor rope_freqs.weight, float [H / 2], or None.
    """
    prefix = metadata["general.architecture"]

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f"{prefix}.{key}", default)
        if kind is float and type(value) is int:
            value = float(value)
        if value is None:
            raise UserError(f"{path}: metadata {prefix}.{key} is missing; convert the model again")
        if type(value) is not kind and value is not default:
            raise UserError(
                f"{path}: metadata {prefix}.{key} is {str(value)[:60]!r}; only a single {kind.__name__} works"
            )
        return value

    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} has no tensor token_embd.weight; it is not a whole model (one part of a split file?)")
    experts, window = get("expert_count", int, 0), get("attention.sliding_window", int, 0)
    kind = ARCHITECTURES[prefix]
    if prefix in ("llama", "mistral"):
        kind = MIXTRAL if experts else MISTRAL if window else kind
    width, heads = get("embedding_length", int), get("attention.head_count", int)
    if heads < 1 or width < 1:
        raise UserError(f"{path}: {heads} heads and width {width}; both must be at least 1")
    head_width = get("attention.key_length", int, get("rope.dimension_count", int, width // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, int, head_width) != head_width:
            raise UserError(f"{path}: {prefix}.{key} is {get(key, int)}, the head width {head_width}; must be equal")
    config = {
        "architectures": [kind.class_name],
        "model_type": kind.model_type,
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length", int, 0 if experts else None),
        "num_hidden_layers": get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head_width,
        "hidden_act": "silu",
        "rms_norm_eps": _short(get("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _short(get("rope.freq_base", float, 10000.0)),
        "rope_scaling": _rope_scaling(path, get, rope_factors, head_width),
        "max_position_embeddings": get("context_length", int),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "sliding_window": window or None,
    }
    if window and prefix.startswith("qwen"):
        config |= {"use_sliding_window": True, "max_window_layers": 0}
    if experts:
        config |= _experts(kind.model_type, experts, get, config["intermediate_size"])
    if prefix == "olmoe":
        config["clip_qkv"] = metadata.get("olmoe.attention.clamp_kqv")
    for token, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{token}_token_id"] = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return config


def _experts(model_type: str, experts: int, get: Any, dense_width: int) -> dict[str, Any]:
    chosen = get("expert_used_count", int)
    if model_type == "mixtral":
        return {"num_local_experts": experts, "num_experts_per_tok": chosen}
    result = {"num_experts": experts, "num_experts_per_tok": chosen, "norm_topk_prob": model_type == "qwen3_moe"}
    if model_type == "qwen3_moe":
        hidden = get("expert_feed_forward_length", int, dense_width)
        result |= {"moe_intermediate_size": hidden, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return result


def _rope_scaling(path: Path, get: Any, factors: np.ndarray | None, head_width: int) -> dict[str, Any] | None:
    if factors is not None:
        return _llama3_scaling(path, factors, get("rope.freq_base", float, 10000.0), head_width)
    for key, neutral in _NEUTRAL.items():
        if get(f"rope.scaling.{key}", float, neutral[0]) not in neutral:
            raise UserError(f"{path}: metadata rope.scaling.{key} is {get(f'rope.scaling.{key}', float)}, which is not "
                            "supported; load the safetensors folder of this model")
    # As llama.cpp reads them: a factor without a type is linear, and once had another name.
    factor = get("rope.scaling.factor", float, get("rope.scale_linear", float, 0.0))
    kind = get("rope.scaling.type", str, "none" if factor in (0, 1) else "linear")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(f"{path}: rope scaling {kind!r:.80} is not supported; supported: linear, yarn, Llama-3 factors")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": _short(factor or get("rope.scaling.factor", float))}
    if kind == "yarn":
        for key in ("beta_fast", "beta_slow"):
            if (value := get(f"rope.scaling.yarn_{key}", float, 0.0)) > 0:  # -1, too, says nothing
                scaling[key] = _short(value)
        scaling["original_max_position_embeddings"] = get("rope.scaling.original_context_length", int)
    return scaling


def _llama3_scaling(path: Path, factors: np.ndarray, theta: float, head_width: int) -> dict[str, Any]:
    """The file stores what the Llama-3 rule gave, not its arguments; all published models share all but `factor`."""
    scaling = {
        "rope_type": "llama3",
        "factor": _short(float(factors.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if factors.shape != (head_width // 2,) or not np.allclose(
        factors, llama3_factors(scaling, theta, head_width), 1e-4
    ):
        raise UserError(
            f"{path}: rope_freqs.weight does not follow the Llama-3 rule with low 1, high 4, length 8192; "
            "load the safetensors folder of this model"
        )
    return scaling


def llama3_factors(scaling: Mapping[str, Any], theta: float, head_width: int) -> np.ndarray:
    """float64 [H / 2]: what each rotary frequency is divided by (Llama 3.1 reference code, apply_scaling)."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_width, 2) / head_width)
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    smooth = np.clip((scaling["original_max_position_embeddings"] / wavelength - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _short(value: float) -> float:
    """float32 stored 1e-5 reads 9.999999747378752e-06 in float64; take the shortest decimal with the same float32."""
    return float(str(np.float32(value)))
