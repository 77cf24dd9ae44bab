"""Sizes of sparse-expert layers that people use, and how their rows fall on the experts (moe_split.md 8.1 and 8.2)."""

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxmodels.kernels.grouped_matmul.tuning.tuner import apportion, even_sizes, zipf_sizes


@dataclasses.dataclass(frozen=True)
class Layer:
    """width: of the model (d); hidden: of an expert (ff); rows: tokens x top_k."""

    name: str
    width: int
    hidden: int
    experts: int
    top_k: int
    tokens: int

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k


# Layer dimensions from the models' configurations, as moe_split.md 8.1 lists them.
LAYERS = {layer.name: layer for layer in (
    Layer("Mixtral-8x7B", 4096, 14_336, 8, 2, 8192),
    Layer("DeepSeek-V3", 7168, 2048, 256, 8, 16_384),
    Layer("DeepSeek-V3 large", 7168, 2048, 256, 8, 65_536),
    Layer("Qwen3-30B-A3B", 2048, 768, 128, 8, 16_384),
    Layer("Qwen3-235B-A22B", 4096, 1536, 128, 8, 16_384),
    Layer("OLMoE-1B-7B", 2048, 1024, 64, 8, 16_384),
    Layer("gpt-oss-120b", 2880, 2880, 128, 4, 16_384),
    Layer("gpt-oss-20b", 2880, 2880, 32, 4, 16_384),
    Layer("SonicMoE point", 4096, 768, 128, 8, 262_144),
    Layer("MoE-split LLaMA-2-7B", 4096, 128, 86, 22, 4096),  # an FFN of 11,008 cut into 86; 22 of them: 26 %
)}  # fmt: skip
# Of a laptop: the FFN of a 135M model (576 wide, 1,536 hidden) as 12 experts of 128, and 64 experts of that size.
SMALL = {layer.name: layer for layer in (
    Layer("E=64 top-4", 576, 128, 64, 4, 512),
    Layer("E=12 top-3", 576, 128, 12, 3, 512),
)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    """One grouped product to measure, rows x inner times [groups, inner, columns], under some distributions.

    `matrix`: "gate/up" (inner the width, columns the hidden) or "down".
    """

    layer: Layer
    matrix: str = "gate/up"
    dtype: str = "bfloat16"
    distributions: tuple[str, ...] = ("even", "zipf", "half empty")

    @property
    def name(self) -> str:
        return self.layer.name if self.matrix == "gate/up" else f"{self.layer.name} {self.matrix}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """rows, inner, columns, groups."""
        sides = (self.layer.width, self.layer.hidden)
        inner, columns = sides if self.matrix == "gate/up" else sides[::-1]
        return self.layer.rows, inner, columns, self.layer.experts


def decode(name: str, tokens: int) -> Layer:
    """The layer with as many tokens as are decoded at once."""
    layer = (LAYERS | SMALL)[name]
    return dataclasses.replace(layer, name=f"{name} T={tokens}", tokens=tokens)


# How rows fall on experts: group sizes int32[groups] of sum `rows`, the same for the same arguments.


def draw_sizes(distribution: str, layer: Layer, seed: int = 0) -> np.ndarray:
    """int32[experts] of sum `layer.rows`."""
    # Of the name, so that two distributions are not the same permutation.
    rng = np.random.default_rng([seed, *distribution.encode()])
    return DISTRIBUTIONS[distribution](layer, rng).astype(np.int32)


def _even(layer: Layer, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(even_sizes(layer.rows, layer.experts))


def _random(layer: Layer, rng: np.random.Generator) -> np.ndarray:
    """Every token draws top_k different experts, all alike."""
    sizes = np.zeros(layer.experts, np.int64)
    for start in range(0, layer.tokens, 4096):
        draws = rng.random((min(4096, layer.tokens - start), layer.experts))
        chosen = np.argpartition(draws, layer.top_k - 1, axis=1)[:, : layer.top_k]
        sizes += np.bincount(chosen.ravel(), minlength=layer.experts)
    return sizes


def _jitter(layer: Layer, rng: np.random.Generator) -> np.ndarray:
    """Within 50 % of even, uniformly."""
    return apportion(layer.rows, rng.uniform(0.5, 1.5, layer.experts))


def _zipf(layer: Layer, rng: np.random.Generator) -> np.ndarray:
    """The i-th busiest expert in proportion to 1 / i."""
    return zipf_sizes(layer.rows, layer.experts, seed=int(rng.integers(2**31)))


def _busy(share: float) -> Callable[[Layer, np.random.Generator], np.ndarray]:
    def sizes(layer: Layer, rng: np.random.Generator) -> np.ndarray:
        chosen, most = rng.integers(layer.experts), round(share * layer.rows)
        rest = even_sizes(layer.rows - most, layer.experts - 1) if layer.experts > 1 else np.array([], np.int64)
        return np.insert(rest, chosen, most if layer.experts > 1 else layer.rows)

    return sizes


def _half_empty(layer: Layer, rng: np.random.Generator) -> np.ndarray:
    busy = rng.permutation(layer.experts) < -(-layer.experts // 2)
    return apportion(layer.rows, busy.astype(float))


DISTRIBUTIONS: dict[str, Callable[[Layer, np.random.Generator], np.ndarray]] = {
    "even": _even, "random": _random, "jitter": _jitter, "zipf": _zipf, "60 % in one": _busy(0.6),
    "all in one": _busy(1.0), "half empty": _half_empty,
}  # fmt: skip

CPU = (
    Point(SMALL["E=64 top-4"], dtype="float32", distributions=tuple(DISTRIBUTIONS)),
    Point(SMALL["E=64 top-4"], "down", "float32", ("even", "random", "zipf")),
    Point(SMALL["E=12 top-3"], dtype="float32", distributions=("even", "random", "zipf")),
    *(Point(decode("E=64 top-4", tokens), dtype="float32", distributions=("random",)) for tokens in (1, 16)),
    Point(LAYERS["OLMoE-1B-7B"], dtype="float32", distributions=("random",)),
)
# Of "down" only one: its forward product has the sides of the other's gradient in x.
ACCELERATOR = (
    *(Point(layer) for name, layer in LAYERS.items() if name != "Qwen3-235B-A22B"),
    Point(LAYERS["Qwen3-235B-A22B"], distributions=tuple(DISTRIBUTIONS)),
    Point(LAYERS["Qwen3-235B-A22B"], "down"),
    *(Point(decode("Qwen3-235B-A22B", tokens), distributions=("random",)) for tokens in (1, 16, 128)),
)
