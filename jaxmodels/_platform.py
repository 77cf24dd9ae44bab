"""What must be settled before jax is imported."""

import importlib.util
import os
from pathlib import Path

from jaxmodels.cache import cache_folder


def prepare_jax() -> None:
    """Settings that must stand before jax is imported: a silent platform and the persistent compilation cache."""
    if "JAX_PLATFORMS" not in os.environ and importlib.util.find_spec("libtpu") and not _has_tpu():
        # libtpu without a TPU prints several lines at every start, unless jax is told not to look
        plugins = map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))
        cuda = Path("/dev/nvidia0").exists() and any(plugins)
        os.environ["JAX_PLATFORMS"] = "cuda,cpu" if cuda else "cpu"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")


def _has_tpu() -> bool:
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
