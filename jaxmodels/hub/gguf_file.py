"""GGUF as a Checkpoint: Hugging Face names, orientation and config, tensors dequantised one at a time."""

import re
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.hub.gguf_config import ARCHITECTURES, hf_config
from jaxmodels.hub.gguf_header import GgufFile

PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "post_attention_norm": "post_attention_layernorm",  # this and the next: OLMo-2, which normalises outputs
    "post_ffw_norm": "post_feedforward_layernorm",
}
EXPERT = {"gate": "mlp.experts.{}.gate_proj", "up": "mlp.experts.{}.up_proj", "down": "mlp.experts.{}.down_proj"}
MIXTRAL_EXPERT = {
    name: f"block_sparse_moe.experts.{{}}.{w}" for name, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
}
SKIPPED = ("rope_freqs.weight",)  # the Llama-3 frequency factors, turned into the config's rope_scaling


@dataclass(frozen=True)
class Part:
    """Where a Hugging Face tensor lies: a GGUF tensor, or one expert of a stacked one; permuted rows if heads > 0."""

    stored: str
    expert: int | None = None
    heads: int = 0


class GgufCheckpoint:
    """See `jaxmodels.hub.checkpoint.Checkpoint`. `metadata` is the file's own, tokenizer included."""

    def __init__(self, path: Path):
        self.path = path
        self._file = GgufFile(path)
        self.metadata = self._file.metadata
        architecture = self.metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise UserError(
                f"{path} has the architecture {architecture!r:.80}; supported in GGUF: {', '.join(ARCHITECTURES)}; "
                "for others load the safetensors folder"
            )
        for name, tensor in self._file.tensors.items():
            if tensor.kind not in PLAIN and tensor.kind not in QUANTISED:
                raise UserError(
                    f"{path}: tensor {name} is quantised as {tensor.kind}; supported: "
                    f"{', '.join([*PLAIN, *QUANTISED])}; get another file of the model, for example Q8_0"
                )
        self.config = hf_config(path, self.metadata, self._file.tensors, self._plain("rope_freqs.weight"))
        self._parts = self._name_parts(permuted=ARCHITECTURES[architecture].permuted)

    def names(self) -> list[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        part = self._parts[name]
        shape = self._file.tensors[part.stored].shape
        return shape if part.expert is None else shape[1:]

    def dtype(self, name: str) -> np.dtype:
        return PLAIN.get(self._file.tensors[self._parts[name].stored].kind, np.dtype(np.float32))

    def read(self, name: str) -> np.ndarray:
        part = self._parts[name]
        value = self._dequantise(part.stored, part.expert)
        return unpermute(value, part.heads) if part.heads else value

    def _plain(self, name: str) -> np.ndarray | None:
        return self._dequantise(name, None) if name in self._file.tensors else None

    def _dequantise(self, stored: str, expert: int | None) -> np.ndarray:
        tensor = self._file.tensors[stored]
        raw, shape = self._file.bytes_of(stored), tensor.shape
        if expert is not None:
            raw, shape = raw.reshape(shape[0], -1)[expert], shape[1:]
        if tensor.kind in PLAIN:
            return raw.view(PLAIN[tensor.kind]).reshape(shape)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        rows = raw.reshape(-1, raw.size * shape[-1] // int(np.prod(shape)))
        return dequantize(rows, GGMLQuantizationType[tensor.kind]).reshape(shape)

    def _name_parts(self, permuted: bool) -> dict[str, Part]:
        parts: dict[str, Part] = {}
        for stored in self._file.tensors:
            if stored in SKIPPED:
                continue
            for name, part in self._hf_names(stored, permuted):
                if name in parts:
                    raise UserError(f"{self.path}: tensors {parts[name].stored} and {stored} are both {name}")
                parts[name] = part
        return parts

    def _hf_names(self, stored: str, permuted: bool) -> list[tuple[str, Part]]:
        mixtral = self.config["model_type"] == "mixtral"
        experts = MIXTRAL_EXPERT if mixtral else EXPERT
        if match := re.fullmatch(r"(\w+)\.(weight|bias)", stored):
            if match[1] in TOP:
                return [(f"{TOP[match[1]]}.{match[2]}", Part(stored))]
        elif match := re.fullmatch(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight", stored):
            prefix = f"model.layers.{match[1]}.{experts[match[2]]}.weight"
            return [(prefix.format(e), Part(stored, e)) for e in range(self._file.tensors[stored].shape[0])]
        elif match := re.fullmatch(r"blk\.(\d+)\.ffn_(gate|up|down)\.(\d+)\.weight", stored):  # Mixtral before 2024-04
            return [(f"model.layers.{match[1]}.{experts[match[2]].format(match[3])}.weight", Part(stored))]
        elif (match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", stored)) and match[2] in BLOCK:
            place = "block_sparse_moe.gate" if mixtral and match[2] == "ffn_gate_inp" else BLOCK[match[2]]
            heads = self._permuted_heads(stored, match[2]) if permuted else 0
            return [(f"model.layers.{match[1]}.{place}.{match[3]}", Part(stored, heads=heads))]
        raise UserError(f"{self.path}: tensor {stored} has no place in {self.config['model_type']}; not supported")

    def _permuted_heads(self, stored: str, role: str) -> int:
        """Heads whose rows are interleaved in this tensor, 0 for none."""
        key = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(role)
        if key is None:
            return 0
        heads, rows = self.config[key], self._file.tensors[stored].shape[0]
        if heads < 1 or rows % (2 * heads):
            raise UserError(f"{self.path}: tensor {stored} has {rows} rows, no multiple of 2 x {heads} heads")
        return heads


def unpermute(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k back to Hugging Face order, [heads * H, ...] or a bias [heads * H].

    llama.cpp's converter interleaves the two halves of each head (its rotary pairs neighbours, Hugging Face's pairs
    i with i + H/2): `permute` in llama.cpp's convert_hf_to_gguf.py, LlamaModel.
    """
    return value.reshape(heads, value.shape[0] // heads // 2, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
