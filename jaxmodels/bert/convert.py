"""Between Hugging Face's names and configs of BERT and ours.

The encoder is RoBERTa's but for three things: names, positions that begin at row 0, and two token types. A single text
has type 0 everywhere, so its row is added to every position (checkpoint.py) and comes back as zeros.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from jaxmodels.bert.config import BertConfig
from jaxmodels.errors import UserError
from jaxmodels.esm import convert as esm
from jaxmodels.hub.entries import Entry, Source

MODEL_TYPES = frozenset(("bert",))
POSITIONS = "bert.embeddings.position_embeddings.weight"
TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
_NAMES = {"roberta.": "bert.", "lm_head.dense.": "cls.predictions.transform.dense.",
          "lm_head.layer_norm.": "cls.predictions.transform.LayerNorm.", "lm_head.bias": "cls.predictions.bias",
          "classifier.dense.": "bert.pooler.dense.", "classifier.out_proj.": "classifier."}  # a beginning -> BERT's


def config_from_hf(hf: dict[str, Any]) -> BertConfig:
    """A config.json as BertConfig; UserError names what is missing or not supported."""
    hf = {key: value for key, value in hf.items() if value is not None}
    pad, room = hf.get("pad_token_id", 0), hf.get("max_position_embeddings", 512)
    for key, value in (("pad_token_id", pad), ("max_position_embeddings", room)):
        if type(value) is not int or not 0 <= value < 2**31:
            raise UserError(f"config.json: {key} is {value!r:.80}; a number from 0 is needed; fetch the model's own "
                            "config.json")
    config = esm.config_from_hf(hf | {"model_type": "roberta"})
    ids = {ours: hf.get(theirs, default) for ours, theirs, default in (
        ("cls_id", "bos_token_id", BertConfig.cls_id), ("eos_id", "eos_token_id", BertConfig.eos_id),
        ("mask_id", "mask_token_id", BertConfig.mask_id))}
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    pool = hf.get("jaxmodels", {}).get("pool", "cls")
    return BertConfig(**fields | ids | {"pad_id": pad, "max_positions": room + pad + 1, "pool": pool})


def config_to_hf(config: BertConfig) -> dict[str, Any]:
    """The config.json that transformers reads."""
    hf = esm.config_to_hf(config)
    architectures = [name.replace("Roberta", "Bert") for name in hf["architectures"]]
    return hf | {"model_type": "bert", "architectures": architectures, "max_position_embeddings": config.max_length,
                 "type_vocab_size": 2}


def entries(config: BertConfig) -> list[Entry]:
    """Every parameter leaf of ``Bert(config)``: its path and the tensors it is made of."""
    lead = config.pad_id + 1
    positions = Source(POSITIONS, (config.max_length, config.d_model),
                       functools.partial(_with_padding, rows=lead), functools.partial(_without_padding, rows=lead))
    return [dataclasses.replace(entry, sources=(positions,) if entry.path == ("positions",) else
                                tuple(dataclasses.replace(source, name=_name(source.name)) for source in entry.sources))
            for entry in esm.entries(config)]


def buffers(config: BertConfig) -> list[tuple[Entry, np.ndarray]]:
    """Tensors of a saved file that are no parameters of ours: token types, which the positions hold already."""
    value = np.zeros((2, config.d_model), config.param_dtype)
    return [(Entry(("token_types",), value.shape, (Source(TOKEN_TYPES, value.shape),)), value)]


def _name(roberta: str) -> str:
    beginning = next(b for b in _NAMES if roberta.startswith(b))
    return _NAMES[beginning] + roberta[len(beginning):]


def _with_padding(w: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([np.zeros((rows, w.shape[1]), w.dtype), w])


def _without_padding(w: np.ndarray, rows: int) -> np.ndarray:
    return w[rows:]
