"""Nothing in the library imports TensorFlow, and PyTorch only where a benchmark compares with it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

IMPORT_ALL = """
import importlib, pkgutil, sys
for room in ("jaxmodels", "train", "analysis", "configs"):
    package = importlib.import_module(room)
    for module in pkgutil.walk_packages(package.__path__, room + "."):
        importlib.import_module(module.name)
from train.data.sources import text_source
assert len(text_source("gettext")) > 40
print([name for name in ("tensorflow", "torch", "django") if name in sys.modules])
"""


def test_importing_everything_imports_no_other_framework():
    run = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
