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

MAPS = 15_000  # memory maps of a process above which compiled programs are dropped
HAS_TORCH = importlib.util.find_spec("torch") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what compares with PyTorch where it is not installed."""
    skip = pytest.mark.skip(reason="PyTorch is not installed; `make test-all` installs it")
    for item in items:
        if "torch" in item.keywords and not HAS_TORCH:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def forgets_programs():
    """Every program that XLA compiles for a CPU holds some memory maps, and Linux gives a process 65,530: with more,
    compiling or storing a program ends in a segmentation fault. A module's programs go when it is done, where they are
    many: the next would have to compile the small ones again."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MAPS:
        import jax

        jax.clear_caches()


@pytest.fixture
def data_folder() -> Path:
    """$JAXMODELS_DATA; skips where there is none."""
    data = os.environ.get("JAXMODELS_DATA")
    if not data or not Path(data).is_dir():
        pytest.skip("JAXMODELS_DATA is not set and ../shared/data does not exist")
    return Path(data)
