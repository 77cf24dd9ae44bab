"""Settings that must stand before jax is imported, and what the suite may use of this machine."""

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# 8 simulated devices for every claim about sharding. Only the flag's absence is changed: a caller's own number stands.
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Asynchronous dispatch can deadlock 8 simulated devices on two cores (rendezvous aborts after 60 s).
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")
if cache := os.environ.get("JAXMODELS_CACHE"):
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches the network

_DATA = ROOT.parent / "shared" / "data"
if _DATA.is_dir():
    os.environ.setdefault("JAXMODELS_DATA", str(_DATA))

if importlib.util.find_spec("beartype"):
    from jaxtyping import install_import_hook

    # Checks the shapes and dtypes that public functions declare, on every call that the suite makes.
    install_import_hook("jaxmodels", "beartype.beartype")

HAS_TORCH = importlib.util.find_spec("torch") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what compares with PyTorch where it is not installed."""
    skip = pytest.mark.skip(reason="PyTorch is not installed; `make test-all` installs it")
    for item in items:
        if "torch" in item.keywords and not HAS_TORCH:
            item.add_marker(skip)


@pytest.fixture
def data_folder() -> Path:
    """$JAXMODELS_DATA; skips where there is none."""
    data = os.environ.get("JAXMODELS_DATA")
    if not data or not Path(data).is_dir():
        pytest.skip("JAXMODELS_DATA is not set and ../shared/data does not exist")
    return Path(data)
