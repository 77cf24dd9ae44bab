"""Small random ESM encoders for the tests, and rows of proteins."""

import jax.numpy as jnp
import numpy as np

from jaxmodels import Esm, EsmConfig
from jaxmodels.esm.alphabet import MASK, encode, pad_batch
from jaxmodels.esm.convert import entries
from jaxmodels.hub.models import build

PROTEINS = ("MKVLAAGXBUZO.-DEF", "acdefgh", "WWHHCCY")  # odd letters, either case
MASKED = ((0, 3), (0, 9), (2, 2))  # (protein, token) that ROWS hides


def tiny(**overrides) -> EsmConfig:
    return EsmConfig.tiny(**({"classes": 5} | overrides))


def random_esm(config: EsmConfig, seed: int = 0) -> Esm:
    """Every leaf drawn from N(0, 0.2²), norms around 1: biases at their initial zeros would hide mistakes."""
    rng = np.random.default_rng(seed)
    arrays = {entry.path: rng.normal(entry.path[-1] == "scale", 0.2, entry.shape) for entry in entries(config)}
    return build(config, {path: jnp.asarray(array, config.param_dtype) for path, array in arrays.items()})


def rows(masked: bool = True) -> list[np.ndarray]:
    """The proteins as ids, some of them <mask>."""
    out = [encode(protein)[0] for protein in PROTEINS]
    for protein, token in MASKED if masked else ():
        out[protein][token] = MASK
    return out


def padded(length: int | None = None) -> np.ndarray:
    """int32[3, T]: the rows in one batch, padded on the right."""
    return pad_batch(rows(), length)


def packed(length: int) -> tuple[np.ndarray, np.ndarray, list[slice]]:
    """(tokens int32[1, T], segments int32[1, T], where each protein lies): all rows in one, then padding."""
    parts = rows()
    ends = np.cumsum([len(part) for part in parts])
    places = [slice(end - len(part), end) for part, end in zip(parts, ends, strict=True)]
    segments = np.zeros((1, length), np.int32)
    for i, place in enumerate(places, 1):
        segments[0, place] = i
    return pad_batch([np.concatenate(parts)], length), segments, places
