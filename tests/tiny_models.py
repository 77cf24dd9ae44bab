"""Small random decoders for the tests, and how near their outputs must be."""

import jax.numpy as jnp
import numpy as np

from jaxmodels import Decoder, DecoderConfig
from jaxmodels.decoder.config import ExpertConfig
from jaxmodels.decoder.convert import entries
from jaxmodels.hub.models import build

# One of everything: windows on some layers, QK-norm, biases; and trained experts behind a post-norm.
DENSE = DecoderConfig.tiny(windows=(None, 4, 3), qk_norm="head", qkv_bias=True, mlp_bias=True)
EXPERT = DecoderConfig.tiny(ffn_widths=(12,) * 3, experts=ExpertConfig(num_experts=5, top_k=2), qk_norm="full",
                            norm_placement="post", clip_qkv=1.5)
CONFIGS = {"dense": DENSE, "experts": EXPERT}


def random_model(config: DecoderConfig, seed: int = 0) -> Decoder:
    """Every leaf drawn from N(0, 0.2²), norms around 1: biases at their initial zeros would hide mistakes."""
    rng = np.random.default_rng(seed)
    arrays = {entry.path: rng.normal(entry.path[-1] == "scale", 0.2, entry.shape) for entry in entries(config)}
    return build(config, {path: jnp.asarray(array, config.param_dtype) for path, array in arrays.items()})


def close(a, b, tolerance=2e-5):
    """Largest difference, against the standard deviation of b."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * b.std()
