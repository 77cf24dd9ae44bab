"""Computes the golden logits of ESM in tests/golden with transformers: ``python -m tests.make_golden_esm`` (PyTorch).

As tests/make_golden.py does for decoders: the config.json that transformers writes, tokens and logits; the weights are
a recipe. ``test_esm_torch.py`` checks that the files are current.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxmodels.esm import convert
from tests.tiny_esm import padded

GOLDEN = Path(__file__).parent / "golden"
SMALL = {
    "vocab_size": 33, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 40, "layer_norm_eps": 1e-5, "pad_token_id": 1, "mask_token_id": 32, "bos_token_id": 0,
    "eos_token_id": 2,
}  # fmt: skip
CASES = {  # name -> (model_type, what differs from SMALL)
    "esm2": ("esm", {"position_embedding_type": "rotary", "token_dropout": True}),
    "esm1b": ("esm", {"position_embedding_type": "absolute", "token_dropout": True, "emb_layer_norm_before": True}),
    "esm_plain": ("esm", {"position_embedding_type": "rotary", "token_dropout": False}),
    "roberta": ("roberta", {"type_vocab_size": 1}),
}
# The released checkpoints store theirs rounded to float16; rounded harder here, so that using them shows.
INV_FREQ = np.array([1.0, 0.1016, 0.01017, 0.001007], np.float32)


def weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """The recipe: matrices N(0, 0.35²), vectors 1 + N(0, 0.2²), in Hugging Face's names, order and orientation."""
    ours = convert.config_from_hf(config)
    shapes = {s.name: s.hf_shape for e in convert.entries(ours) for s in e.sources}
    if config["model_type"] == "roberta":
        shapes["roberta.embeddings.token_type_embeddings.weight"] = (1, 32)
    rng = np.random.default_rng(seed)
    out = {name: np.float32(rng.normal(size=shapes[name]) * 0.2 + 1 if len(shapes[name]) == 1 else
                            rng.normal(size=shapes[name]) * 0.35) for name in sorted(shapes)}
    if ours.position == "rotary":
        out["esm.rotary_embeddings.inv_freq"] = INV_FREQ
    return out


def write_folder(folder: Path, config: dict) -> Path:
    """A model folder as it comes from the hub, made without transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights(config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_of(name: str) -> dict:
    """The config.json that transformers writes for a case, less the version that wrote it."""
    import transformers

    model_type, changes = CASES[name]
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | changes))
    config.architectures = [{"esm": "EsmForMaskedLM", "roberta": "RobertaForMaskedLM"}[model_type]]
    written = json.loads(config.to_json_string())
    written.pop("transformers_version", None)
    return written


def logits_of(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """float32[B, T, V] by transformers, in eager attention; refuses a folder whose tensors do not fit its config."""
    import torch
    import transformers

    model, info = transformers.AutoModelForMaskedLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"] or info.get("mismatched_keys"):
        raise ValueError(f"{folder}: transformers reads it with {info}")
    ids = torch.tensor(tokens, dtype=torch.long)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=(ids != 1).long()).logits.numpy()


def main() -> None:
    tokens = padded()
    for name in CASES:
        config = config_of(name)
        with tempfile.TemporaryDirectory() as folder:
            logits = logits_of(write_folder(Path(folder), config), tokens)
        real = logits[tokens != 1]
        np.savez_compressed(GOLDEN / f"{name}.npz", tokens=tokens, logits=real)
        (GOLDEN / f"{name}.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        print(f"{name}: {logits.shape}, std {real.std():.3f}")


if __name__ == "__main__":
    sys.exit(main())
