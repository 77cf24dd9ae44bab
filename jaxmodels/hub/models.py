"""``jaxmodels.load`` and ``jaxmodels.save``: whole models between files and memory."""

import dataclasses
import importlib
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.errors import UserError
from jaxmodels.hub.checkpoint import Checkpoint, open_checkpoint
from jaxmodels.hub.load import load_arrays, save_arrays
from jaxmodels.hub.resolve import resolve

DTYPES = ("float32", "bfloat16", "float16")
KINDS = {"bert": "Bert", "decoder": "Decoder", "esm": "Esm"}  # folder of jaxmodels/ -> class of its model.py


def load(name: str | os.PathLike, dtype: str = "float32", *, scan_layers: bool = True, allow_download: bool = False,
         seed: int = 0, **options) -> nnx.Module:
    """Loads a model from a folder, a safetensors or GGUF file, or a known name. Never opens a pickle.

    Args:
      name: a path, a model inside an installed package (``smollm2-135m-instruct``, ``all-minilm-l6-v2``), or
        ``org/name`` on the Hugging Face hub, which needs ``allow_download``.
      dtype: of parameters and computation; float32, bfloat16 or float16.
      scan_layers: stack equal layers and scan over them; False keeps each layer alone, which decodes faster.
      seed: of heads that are made afresh.
      options: what a kind of model adds. Encoders: lm_head, contact_head, classes, pool, rope_inv_freq
        (jaxmodels/esm/checkpoint.py), or lm_head, classes, pool (jaxmodels/bert/checkpoint.py).

    Returns a Decoder, an Esm or a Bert, by the ``model_type`` of its config.json.
    Raises UserError, one line, for anything missing, damaged, unknown or unsafe.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(resolve(name, allow_download))
    kind = _kind(checkpoint)
    convert = importlib.import_module(f"jaxmodels.{kind}.convert")
    fresh: tuple[str, ...] = ()
    if kind == "decoder":
        _check_options(options, None, kind)
        config = convert.config_from_hf(checkpoint.config)
    else:
        prepare = importlib.import_module(f"jaxmodels.{kind}.checkpoint").prepare
        _check_options(options, prepare, kind)
        checkpoint, config, fresh = prepare(checkpoint, **options)
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype, scan_layers=scan_layers)
    entries = [entry for entry in convert.entries(config) if not _below(entry.path, fresh)]
    arrays = load_arrays(checkpoint, entries, dtype)
    return build(config, arrays | _fresh(config, fresh, seed))


def save(model: nnx.Module, folder: str | os.PathLike, *, tokenizer: str | os.PathLike | None = None,
         extra_files: Mapping[str, Any] | None = None, overwrite: bool = False) -> Path:
    """Writes ``folder`` with config.json and safetensors under Hugging Face names; ``transformers`` loads it.

    tokenizer: a model folder or GGUF file whose tokenizer is written beside the weights. Split and pruned models carry
    what transformers cannot express under the ``jaxmodels`` key of config.json. The folder appears whole or not at all.
    """
    convert = importlib.import_module(f"jaxmodels.{_kind_of(model.cfg)}.convert")
    files = dict(extra_files or {})
    if tokenizer is not None:
        from jaxmodels.hub.tokenizer import load_tokenizer

        files |= load_tokenizer(resolve(tokenizer)).files()
    entries, arrays = convert.entries(model.cfg), leaves(model)
    for entry, value in getattr(convert, "buffers", lambda config: ())(model.cfg):
        entries.append(entry)
        arrays[entry.path] = value
    if hasattr(convert, "files"):
        files = convert.files(model.cfg) | files
    return save_arrays(folder, entries, arrays, convert.config_to_hf(model.cfg), extra_files=files, overwrite=overwrite)


def build(config, arrays: Mapping[tuple, jax.Array]) -> nnx.Module:
    """The model of ``config`` that holds ``arrays`` (path in the pure-dict state -> leaf); every leaf must be there."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: _class_of(config)(config, rngs=nnx.Rngs(0))))
    flat = dict(nnx.to_flat_state(abstract))
    missing = set(flat) - set(arrays)
    if missing or set(arrays) - set(flat):
        raise ValueError(f"arrays do not match the model: missing {sorted(map(str, missing))[:3]}, "
                         f"unknown {sorted(map(str, set(arrays) - set(flat)))[:3]}")
    for path, variable in flat.items():
        flat[path] = variable.replace(jnp.asarray(arrays[path]))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def leaves(model: nnx.Module) -> dict[tuple, jax.Array | np.ndarray]:
    """path in the pure-dict state -> array, for every parameter of the model, wherever it lies."""
    return {path: variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}


def _kind(checkpoint: Checkpoint) -> str:
    """The folder of jaxmodels/ that reads this ``model_type``."""
    model_type = checkpoint.config.get("model_type")
    known = {kind: importlib.import_module(f"jaxmodels.{kind}.convert").MODEL_TYPES for kind in KINDS}
    for kind, types in known.items():
        if isinstance(model_type, str) and model_type in types:
            return kind
    if model_type is None and any("encoder.layer." in name for name in checkpoint.names()):
        return "esm"  # the config.json of some encoders says everything but this
    raise UserError(f"model_type {str(model_type)!r} is not one that this library reads; supported: "
                    f"{', '.join(sorted(frozenset().union(*known.values())))}")


def _kind_of(config) -> str:
    return type(config).__module__.split(".")[1]  # jaxmodels.<kind>.config


def _class_of(config) -> type:
    kind = _kind_of(config)
    return getattr(importlib.import_module(f"jaxmodels.{kind}.model"), KINDS[kind])


def _check_options(options: Mapping[str, Any], function, kind: str) -> None:
    known = [] if function is None else list(inspect.signature(function).parameters)[1:]
    for option in options:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none of its own"
            raise UserError(f"load: {option!r} is not an option of a model of the kind {kind}; {has}")


def _below(path: tuple, heads: tuple[str, ...]) -> bool:
    """Whether a leaf is one of the heads (``lm_head``) or of the parameters of a head (``classifier.out``)."""
    text = ".".join(map(str, path))
    return any(text == head or text.startswith(f"{head}.") for head in heads)


def _fresh(config, heads: tuple[str, ...], seed: int) -> dict[tuple, jax.Array]:
    """Leaves of heads that a checkpoint lacks, as a new model has them; nothing else is allocated."""
    if not heads:
        return {}

    @jax.jit
    def draw():
        state = nnx.to_flat_state(nnx.state(_class_of(config)(config, rngs=nnx.Rngs(seed))))
        return {path: variable[...] for path, variable in state if _below(path, heads)}

    return draw()
