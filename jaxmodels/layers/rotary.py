"""Rotary position embedding (Su et al. 2021) with the length extensions that released checkpoints use."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Frequencies of the rotation. ``kind`` is one of default, linear, llama3, yarn; the rest are its parameters.

    llama3: Llama 3.1 model card code. yarn: Peng et al. 2023, section 3.2-3.4 (NTK-by-parts and the temperature
    of eq. 22). ``truncate`` rounds YaRN's correction range outwards to whole dimensions, as released code does.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """(radians per position, float64[H/2]; factor on cos and sin)."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        freq = self.theta ** -exponent
        if self.kind == "linear":
            return freq / self.factor, 1.0
        if self.kind == "llama3":
            wavelength = 2 * math.pi / freq
            low, high = self.low_freq_factor, self.high_freq_factor
            smooth = (self.original_max_positions / wavelength - low) / (high - low)
            smooth = np.clip(smooth, 0.0, 1.0)  # 0: long waves, slowed down; 1: short waves, kept
            return (1 - smooth) * freq / self.factor + smooth * freq, 1.0
        if self.kind == "yarn":
            return self._yarn(freq, head_dim)
        return freq, 1.0

    def rotation(self, positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """cos and sin of the angles at int[B, T]: float32[B, T, 1, H/2] each. All layers share them."""
        return turns(positions, *self.frequencies(head_dim))

    def _yarn(self, freq: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
        def dimension(rotations: float) -> float:
            return (head_dim * math.log(self.original_max_positions / (rotations * 2 * math.pi))
                    / (2 * math.log(self.theta)))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
        freq = freq / self.factor * ramp + freq * (1 - ramp)

        def temperature(m: float) -> float:
            return 0.1 * m * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.attention_factor is not None:
            return freq, self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return freq, temperature(self.mscale) / temperature(self.mscale_all_dim)
        return freq, temperature(1.0)


def turns(positions: jax.Array, frequencies: np.ndarray, factor: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """cos and sin, times ``factor``, of positions int[B, T] by frequencies [H/2] (radians a position):
    float32[B, T, 1, H/2] each."""
    # float32 angles: positions above 256 collide in bfloat16.
    angle = positions[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    # A loop of two steps is what XLA does not fuse: else it computes cos and sin again wherever they are read, in
    # every layer, head by head (a twentieth of the forward pass on CPU, where it drops optimization_barrier).
    cos, sin = jax.lax.map(lambda part: jnp.where(part == 0, jnp.cos(angle), jnp.sin(angle)), jnp.arange(2))
    return cos * factor, sin * factor


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [B, T, N, H]; halves are paired (Hugging Face's order), not neighbours."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
