"""Experts: split a dense feed-forward layer, route to its parts, prune it, repair it. See README.md.

Names load on first use: the worker processes of `split_many` import this package and must not pay for jax.
"""

import importlib

_HOME = {
    "assign": ("assign_exact", "assign_greedy", "balanced_kmeans"),
    "split": ("Split", "apply_split", "find_split", "merge_experts", "split_ffn", "split_many"),
    "layer": ("Dispatch", "apply_experts", "combine_rows", "dense_ffn", "dispatch", "gather_rows"),
    "routers": (
        "AnalyticRouter", "LinearRouter", "MLPRouter", "OracleRouter", "RandomRouter", "SimilarityRouter",
        "captured_mass", "oracle_scores", "recall", "relative_error", "select", "select_blocks", "train_router",
    ),
    "prune": ("adaptive_counts", "neuron_order", "prune_experts", "select_experts", "union_scores"),
    "recover": (
        "Moments", "Refit", "add_moments", "bias_compensation", "moments", "refit", "refit_down", "zero_moments",
    ),
}  # fmt: skip
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE)


def __getattr__(name: str):
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)
