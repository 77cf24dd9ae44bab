"""Computes the golden logits of BERT in tests/golden with transformers: ``python -m tests.make_golden_bert`` (PyTorch).

As tests/make_golden_esm.py: the config.json that transformers writes, tokens and logits; the weights are a recipe.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxmodels.bert import convert

GOLDEN = Path(__file__).parent / "golden"
SMALL = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 24, "pad_token_id": 0}
TOKENS = np.random.default_rng(0).integers(4, 60, (3, 20)).astype(np.int32)
TOKENS[1, 13:] = TOKENS[2, 5:] = 0


def weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Matrices N(0, 0.35²), vectors 1 + N(0, 0.2²), in Hugging Face's names, order and orientation."""
    shapes = {s.name: s.hf_shape for e in convert.entries(convert.config_from_hf(config)) for s in e.sources}
    shapes[convert.TOKEN_TYPES] = (2, config["hidden_size"])
    rng = np.random.default_rng(seed)
    return {name: np.float32(rng.normal(size=shapes[name]) * 0.2 + 1 if len(shapes[name]) == 1 else
                             rng.normal(size=shapes[name]) * 0.35) for name in sorted(shapes)}


def write_folder(folder: Path, config: dict) -> Path:
    """A model folder as it comes from the hub, made without transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights(config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config() -> dict:
    """The config.json that transformers writes, less the version that wrote it."""
    import transformers

    config = transformers.BertConfig(**SMALL)
    config.architectures = ["BertForMaskedLM"]
    written = json.loads(config.to_json_string())
    written.pop("transformers_version", None)
    return written


def logits_of(folder: Path) -> np.ndarray:
    """float32[B, T, V] by transformers, in eager attention; refuses a folder whose tensors do not fit its config."""
    import torch
    import transformers

    model, info = transformers.BertForMaskedLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"] or info.get("mismatched_keys"):
        raise ValueError(f"{folder}: transformers reads it with {info}")
    ids = torch.tensor(TOKENS, dtype=torch.long)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=(ids != 0).long()).logits.numpy()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        logits = logits_of(write_folder(Path(folder), config()))
    np.savez_compressed(GOLDEN / "bert.npz", tokens=TOKENS, logits=logits[TOKENS != 0])
    (GOLDEN / "bert.json").write_text(json.dumps(config(), indent=1, sort_keys=True) + "\n")
    print(f"bert: {logits.shape}, std {logits.std():.3f}")


if __name__ == "__main__":
    sys.exit(main())
