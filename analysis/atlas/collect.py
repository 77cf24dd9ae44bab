"""Runs the model over the texts and keeps counts: the only place where the atlas looks into the model."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from analysis.activations import activity_taps, down_norms, flatten_activity
from analysis.atlas.text import Language, Rows
from jaxmodels.decoder.model import Decoder

HALVES = 2  # every count is kept for two halves of the text, for split-half reliability


def batches(rows: Rows, most: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(tokens int32[B, T], mask bool[B, T], half int[B]) of B <= ``most`` rows, all of one shape.

    B is chosen so that little padding is computed (20 rows are twice 10, not 16 and 4 of 16), and even, so that
    languages of about the same size share a compilation.
    """
    total = len(rows.tokens)
    size = -(-total // -(-total // most))
    size = min(most, size + size % 2)
    for start in range(0, total, size):
        tokens, mask = rows.tokens[start:start + size], rows.mask[start:start + size]
        half = (np.arange(start, start + len(tokens)) * HALVES) // total
        short = size - len(tokens)
        yield (np.pad(tokens, ((0, short), (0, 0))), np.pad(mask, ((0, short), (0, 0))), np.pad(half, (0, short)))


def expert_k(share: float, num_experts: int) -> int:
    """k of the top-k: the share of the experts, at least one."""
    return max(1, round(share * num_experts))


def activity(model: Decoder, rows: Rows, perm: np.ndarray, norms, cfg: Any, num_experts: int, *,
             neurons: bool = False) -> dict[str, np.ndarray]:
    """Counts of one language's rows, int64 and float64 on the host, with a leading axis of halves.

    Returns tokens int64[2]; expert_top_<k> int64[2, L, E]; positive_gate int64[2, L, F]; sum, square float64[2, L, F];
    with ``neurons`` also neuron_top int64[2, L, F], which costs a third more time. Padding and the first
    ``cfg.text.skip`` positions of each row are not counted.
    """
    ks = tuple(sorted({expert_k(s, num_experts) for s in cfg.profile.shares}))
    neuron_k = expert_k(cfg.profile.main_share, perm.shape[1]) if neurons else 0
    totals: dict[str, np.ndarray] = {}
    for tokens, mask, half in batches(rows, cfg.text.batch):
        counted = mask & (np.arange(mask.shape[1]) >= cfg.text.skip)
        taps = activity_taps(norms, jnp.asarray(perm), jnp.asarray(counted), num_experts=num_experts, expert_ks=ks,
                             neuron_k=neuron_k)
        _, aux = model(jnp.asarray(tokens), mask=jnp.asarray(mask), taps=taps, logits="none")
        found = {name: np.asarray(value) for name, value in flatten_activity(aux).items()}
        found["tokens"] = counted.sum(1)[None]
        for name, value in found.items():  # [L, B, ...] -> [2, L, ...]
            wide = np.float64 if value.dtype.kind == "f" else np.int64
            part = np.stack([value[:, half == h].sum(1, dtype=wide) for h in range(HALVES)])
            totals[name] = totals[name] + part if name in totals else part
    totals["tokens"] = totals["tokens"][:, 0]
    return totals


def token_histogram(language: Language, vocab_size: int) -> np.ndarray:
    """int64[V]: how often each token id occurs in the analysis part (a control of the Mantel test)."""
    rows = language.parts["analysis"]
    return np.bincount(rows.tokens[rows.mask], minlength=vocab_size)


class Collector:
    """Activity of every language and part, computed once and kept in the run folder."""

    def __init__(self, model: Decoder, perm: np.ndarray, cfg: Any, num_experts: int, run: Any):
        self.model, self.perm, self.cfg, self.num_experts, self.run = model, perm, cfg, num_experts, run
        self.norms = down_norms(model)

    def collect(self, jobs: list[tuple[Language, str]]) -> None:
        """Computes what is missing of (language, part), most of the atlas's time; safe to interrupt between them."""
        todo = [(lang, part) for lang, part in jobs if self.run.load_npz(_name(lang, part)) is None]
        total = sum(len(lang.parts[part].tokens) for lang, part in jobs)
        done = total - sum(len(lang.parts[part].tokens) for lang, part in todo)
        with self.run.progress(total, "reading languages", done) as advance:
            for lang, part in todo:
                rows = lang.parts[part]
                # Single neurons' ranks only matter where neurons are chosen.
                neurons = self.cfg.profile.neurons and part == "selection"
                self.run.save_npz(_name(lang, part), **activity(self.model, rows, self.perm, self.norms, self.cfg,
                                                                 self.num_experts, neurons=neurons))
                advance(len(rows.tokens), lang.name)
                self.run.check_stop()

    def get(self, language: Language, part: str) -> dict[str, np.ndarray]:
        return self.run.load_npz(_name(language, part))


def _name(language: Language, part: str) -> str:
    return f"cache/activity/{part}/{language.code}"
