"""Computes the golden logits of tests/golden with transformers: ``python tests/make_golden.py`` (needs PyTorch).

A few kilobytes for each family: the config.json that transformers writes, tokens, padding and logits. The weights are
a recipe, not data: numpy's generator fills every tensor of the checkpoint in the order of the sorted names. Renew the
files only after a deliberate change of the recipe; ``test_decoder_torch.py`` checks that they are current.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxmodels.decoder import convert

GOLDEN = Path(__file__).parent / "golden"
SMALL = {
    "vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2}
STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 8}
CASES = {  # name -> (model_type, what differs from SMALL)
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_linear": ("llama", {"hidden_act": "gelu", "rope_parameters": {
        "rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama3": ("llama", {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **STRETCHED}}),
    # Sizes at which YaRN's correction range falls between whole dimensions, so that rounding it matters.
    "llama_yarn": ("llama", {"head_dim": 32, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 4.0,
        "original_max_position_embeddings": 64}}),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 16}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "olmo2": ("olmo2", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, **EXPERTS}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 6, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 16,
                                "mlp_only_layers": [1], **EXPERTS}),
    "olmoe": ("olmoe", {"num_experts": 6, "clip_qkv": 0.5, **EXPERTS}),
}  # fmt: skip
TOKENS = 14


def weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """The recipe: matrices N(0, 0.3²), vectors 1 + N(0, 0.3²), in Hugging Face's names, order and orientation."""
    shapes = {s.name: s.hf_shape for e in convert.entries(convert.config_from_hf(config)) for s in e.sources}
    rng = np.random.default_rng(seed)
    return {name: (rng.normal(size=shapes[name]) * 0.3 + (len(shapes[name]) == 1)).astype(np.float32)
            for name in sorted(shapes)}


def write_folder(folder: Path, config: dict) -> Path:
    """A model folder as it comes from the hub, made without transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights(config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32[3, T], mask bool[3, T]): a full row, one padded on the left, one padded on the right."""
    tokens = np.random.default_rng(1).integers(3, SMALL["vocab_size"], (3, TOKENS)).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    mask[1, :5], mask[2, 9:] = False, False
    return tokens, mask


def config_of(name: str) -> dict:
    """The config.json that transformers writes for a case, less the version that wrote it."""
    import transformers

    model_type, changes = CASES[name]
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | changes))
    config.architectures = [convert.ARCHITECTURES[model_type]]
    written = json.loads(config.to_json_string())
    written.pop("transformers_version", None)
    return written


def logits_of(folder: Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """float32[B, T, V] by transformers, in eager attention; refuses a folder whose tensors do not fit its config."""
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"] or info.get("mismatched_keys"):
        raise ValueError(f"{folder}: transformers reads it with {info}")
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(mask).long(),
                            position_ids=torch.tensor(positions)).logits.numpy()


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    tokens, mask = inputs()
    for name in CASES:
        config = config_of(name)
        with tempfile.TemporaryDirectory() as folder:
            logits = logits_of(write_folder(Path(folder), config), tokens, mask)
        np.savez_compressed(GOLDEN / f"{name}.npz", tokens=tokens, mask=mask, logits=logits[mask])
        (GOLDEN / f"{name}.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        print(f"{name}: {logits.shape}, std {logits[mask].std():.3f}")


if __name__ == "__main__":
    sys.exit(main())
