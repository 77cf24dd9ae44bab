"""From fair-esm's and fairseq's ``.pt`` files to a folder that jaxmodels and transformers read.

    python -m jaxmodels.esm.convert_pt esm2_t6_8M_UR50D.pt folder

A ``.pt`` file is a pickle; it is read by ``torch.load(weights_only=True)``, which runs no code of the file's, and only
here. Reads ESM-2 and ESM-1b of facebookresearch/esm, with the contact regression that lies beside them, and RoBERTa
encoders of fairseq; a ``.safetensors`` file under the same names as well, without PyTorch.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.errors import UserError

_PREFIX = re.compile(r"^(model\.)?((en|de)coder\.sentence_encoder\.|(en|de)coder\.)")
_LAYER = re.compile(r"^layers\.(\d+)\.(.*)$")
_MODEL = {  # fair-esm's name -> (transformers' name in an Esm model, in a Roberta model)
    "embed_tokens.weight": ("embeddings.word_embeddings.weight",) * 2,
    "embed_positions.weight": ("embeddings.position_embeddings.weight",) * 2,
    "emb_layer_norm_before": ("embeddings.layer_norm", None), "emb_layer_norm": (None, "embeddings.LayerNorm"),
    "emb_layer_norm_after": ("encoder.emb_layer_norm_after", None),
    "contact_head.regression": ("contact_head.regression", None),
}
_IN_LAYER = {
    "self_attn.q_proj": ("attention.self.query",) * 2, "self_attn.k_proj": ("attention.self.key",) * 2,
    "self_attn.v_proj": ("attention.self.value",) * 2, "self_attn.out_proj": ("attention.output.dense",) * 2,
    "self_attn.rot_emb.inv_freq": ("attention.self.rotary_embeddings.inv_freq", None),
    "self_attn_layer_norm": ("attention.LayerNorm", "attention.output.LayerNorm"),
    "fc1": ("intermediate.dense",) * 2, "fc2": ("output.dense",) * 2,
    "final_layer_norm": ("LayerNorm", "output.LayerNorm"),
}
_IGNORED = re.compile(r"(^|\.)version$|_float_tensor$")


class Tensors:
    """Arrays in memory as a hub.Checkpoint."""

    def __init__(self, path: Path, config: dict[str, Any], arrays: Mapping[str, np.ndarray]):
        self.path, self.config, self.metadata, self._arrays = path, config, {}, arrays

    def names(self) -> list[str]:
        return list(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._arrays[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._arrays[name].dtype

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]


def convert(source: str | Path, folder: str | Path, *, heads: int | None = None, contacts: str | Path | None = None,
            dtype: str = "float32") -> Path:
    """Writes ``folder`` from a .pt or .safetensors file; returns it.

    heads: attention heads, where the file does not say. contacts: the file of the contact regression; default: the one
    that fair-esm keeps beside the weights, if it is there.
    Raises UserError for a file without PyTorch to read it, of another kind of model, or that does not say enough.
    """
    import jaxmodels
    from jaxmodels.esm.checkpoint import prepare
    from jaxmodels.esm.convert import entries
    from jaxmodels.hub.load import load_arrays
    from jaxmodels.hub.models import DTYPES, build

    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    source = Path(source)
    state, arguments = _read(source)
    beside = Path(contacts) if contacts else source.with_name(f"{source.stem}-contact-regression{source.suffix}")
    if contacts or beside.exists():
        state |= _read(beside)[0]
    checkpoint, config, _ = prepare(from_fair(state, arguments, source, heads))
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    arrays = load_arrays(checkpoint, entries(config), dtype)
    return jaxmodels.save(build(config, arrays), folder)


def from_fair(state: Mapping[str, np.ndarray], arguments: Mapping[str, Any], path: Path,
              heads: int | None = None) -> Tensors:
    """A state dict of fair-esm or fairseq under transformers' names, with the config.json that belongs to it."""
    state = {_PREFIX.sub("", name): value for name, value in state.items()}
    if "embed_tokens.weight" not in state or "layers.0.fc1.weight" not in state:
        raise UserError(f"{path} is not an ESM or RoBERTa encoder (no embed_tokens.weight, or no layers.0.fc1.weight); "
                        "ESM-2, ESM-1b and fairseq's RoBERTa are read")
    pre = "emb_layer_norm_after.weight" in state
    if pre != ("emb_layer_norm.weight" not in state) or not pre and "embed_positions.weight" not in state:
        raise UserError(f"{path} is neither like ESM-2 or ESM-1b (emb_layer_norm_after) nor like RoBERTa "
                        "(emb_layer_norm and embed_positions); ESM-1 and MSA Transformer are not read")
    heads = heads or arguments.get("encoder_attention_heads") or arguments.get("attention_heads")
    if heads is None:
        raise UserError(f"{path} does not say how many attention heads it has; give --heads N")
    learned = "embed_positions.weight" in state
    vocab, width = state["embed_tokens.weight"].shape
    config: dict[str, Any] = {
        "model_type": "esm" if pre else "roberta", "vocab_size": vocab, "hidden_size": width,
        "num_hidden_layers": 1 + max(int(found[1]) for found in map(_LAYER.match, state) if found),
        "num_attention_heads": heads, "intermediate_size": state["layers.0.fc1.weight"].shape[0],
        "layer_norm_eps": 1e-5, "position_embedding_type": "absolute" if learned else "rotary",
        "max_position_embeddings": state["embed_positions.weight"].shape[0] if learned else 1026,
    }
    if pre:
        config |= {"emb_layer_norm_before": "emb_layer_norm_before.weight" in state,
                   "token_dropout": bool(arguments.get("token_dropout", True))}
    if vocab != 33 and pre:
        raise UserError(f"{path} has {vocab} tokens; the vocabulary of ESM-2 and ESM-1b has 33")
    config["architectures"] = [("Esm" if pre else "Roberta") + ("ForMaskedLM" if "lm_head.bias" in state else "Model")]
    arrays = {name: value for old, value in state.items() if (name := _name(old, pre, path)) is not None}
    return Tensors(path, config, arrays)


def _name(old: str, pre: bool, path: Path) -> str | None:
    if _IGNORED.search(old):
        return None
    if old.startswith("lm_head."):
        return "lm_head.decoder.weight" if old == "lm_head.weight" else old
    column, base = (0, "esm.") if pre else (1, "roberta.")
    found = _LAYER.match(old)
    table, prefix, rest = (_IN_LAYER, f"encoder.layer.{found[1]}.", found[2]) if found else (_MODEL, "", old)
    if rest in table:
        new = table[rest][column]
    else:
        stem, _, end = rest.rpartition(".")
        new = table.get(stem, (None, None))[column]
        new = new and f"{new}.{end}"
    if new is None:
        raise UserError(f"{path} holds the tensor {old}, which no model that is read here has; ESM-2, ESM-1b and "
                        "fairseq's RoBERTa are read")
    return base + prefix + new


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, arguments of the program that trained the model)."""
    if not path.is_file():
        raise UserError(f"no weights at {path}; give a .pt file of fair-esm or fairseq")
    if path.suffix == ".safetensors":
        from jaxmodels.hub.safetensors_file import SafetensorsCheckpoint

        file = SafetensorsCheckpoint(path, {}, {None: path})
        return {name: np.asarray(file.read(name)) for name in file.names()}, {}
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} is a pickle that only PyTorch reads, and PyTorch is not installed; run: pip install "
                        "torch") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # how fairseq stores its options; plain data
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have classes of their own
        raise UserError(f"{path} is not read by torch.load(weights_only=True): "
                        f"{(str(error).splitlines() or [type(error).__name__])[0][:160]}") from None
    if not isinstance(data, Mapping) or not isinstance(data.get("model"), Mapping):
        raise UserError(f"{path} holds no 'model', so it is not a file of fair-esm or fairseq")
    arguments = data.get("args") or (data.get("cfg") or {}).get("model") or {}
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else dict(arguments)
    return {name: value.float().numpy() for name, value in data["model"].items()}, arguments


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jaxmodels.esm.convert_pt",
                                     description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", metavar="IN.pt", help="weights of fair-esm or fairseq")
    parser.add_argument("folder", metavar="OUT", help="folder to write")
    parser.add_argument("--heads", type=int, metavar="N", help="attention heads, where the file does not say")
    parser.add_argument("--contacts", metavar="FILE", help="contact regression (default: IN-contact-regression.pt)")
    parser.add_argument("--dtype", default="float32", help="of what is written: float32 (default), bfloat16, float16")
    arguments = parser.parse_args(argv)
    try:
        print(convert(arguments.source, arguments.folder, heads=arguments.heads, contacts=arguments.contacts,
                      dtype=arguments.dtype))
    except UserError as error:
        print(f"convert_pt: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
