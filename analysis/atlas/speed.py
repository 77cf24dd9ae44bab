"""How much faster a statically pruned model really is, beside the most that Amdahl's law allows.

speed-up <= 1 / (1 - phi (1 - rho)): rho is the share of the feed-forward layers that is kept, phi their share of the
dense model's time, measured in the same run as 1 - time without FFN / time dense. All models are timed in turn, so
that a noisy machine slows them alike.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.decoder.generate import stream
from jaxmodels.decoder.model import Decoder
from jaxmodels.experts.models import prune, unroll
from jaxmodels.experts.prune import select_experts

PROMPT = 64  # tokens before decoding starts


def measure(model: Decoder, scores: np.ndarray, cfg: Any, run: Any) -> list[dict[str, Any]]:
    """One row for each phase (prefill, decode) and share, dense (1) first.

    scores: float[L, F], which neurons to keep first. Returns milliseconds (median, p10, p90), tokens a second,
    speed-up, ceiling and their ratio. Reads nothing from a cache: a time belongs to the run that reports it.
    """
    cfg_shares = sorted({1.0, *cfg.shares}, reverse=True)
    models = {share: unroll(model) if share == 1 else prune(model, select_experts(scores, share, rule="uniform"))
              for share in cfg_shares}
    one = np.zeros(scores.shape, bool)
    one[:, 0] = True  # one neuron a layer: as good as no FFN
    models[0.0] = prune(model, one)
    rows: list[dict[str, Any]] = []
    phases = {"prefill": (_prefill, cfg.prefill), "decode": (_decode, cfg.decode)}
    with run.progress(len(phases) * cfg.repeats * len(models), "timing pruned models") as advance:
        for phase, (task, tokens) in phases.items():
            times: dict[float, list[float]] = {share: [] for share in models}
            calls = {share: task(pruned, tokens) for share, pruned in models.items()}
            for call in calls.values():
                call()  # compiles
            for _ in range(cfg.repeats):
                for share, call in calls.items():
                    times[share].append(call())
                    advance(1, f"{phase} at {share:.0%}")
                run.check_stop()
            rows += _rows(phase, tokens, times)
    return rows


def _rows(phase: str, tokens: int, times: dict[float, list[float]]) -> list[dict[str, Any]]:
    typical = {share: float(np.median(t)) for share, t in times.items()}
    phi = 1 - typical[0.0] / typical[1.0]
    rows = []
    for share in times:
        if share == 0:
            continue
        ceiling = 1 / (1 - phi * (1 - share))
        # Ratios within each round: what slows one model down slows its neighbours in time as well.
        speedup = float(np.median(np.asarray(times[1.0]) / np.asarray(times[share])))
        rows.append({
            "phase": phase, "share": share, "tokens": tokens, "ms": 1e3 * typical[share],
            "ms_p10": 1e3 * float(np.quantile(times[share], 0.1)),
            "ms_p90": 1e3 * float(np.quantile(times[share], 0.9)), "tokens_per_second": tokens / typical[share],
            "speedup": speedup, "ceiling": ceiling, "of_ceiling": speedup / ceiling, "phi": phi})
    return rows


def _prefill(model: Decoder, tokens: int) -> Callable[[], float]:
    ids = jnp.asarray(np.random.default_rng(0).integers(0, model.cfg.vocab_size, (1, tokens)), jnp.int32)

    def call() -> float:
        start = time.perf_counter()
        jax.block_until_ready(model(ids, logits="last")[0])
        return time.perf_counter() - start

    return call


def _decode(model: Decoder, tokens: int) -> Callable[[], float]:
    prompt = np.random.default_rng(0).integers(0, model.cfg.vocab_size, PROMPT).tolist()

    def call() -> float:
        steps = stream(model, [prompt], tokens + 1, stop_ids=())
        next(steps)  # the prefill's token
        start = time.perf_counter()
        for _ in steps:
            pass
        return time.perf_counter() - start

    return call
