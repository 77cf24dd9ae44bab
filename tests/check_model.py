"""Checks the list of docs/add_a_model.md: ``python -m tests.check_model [NAME]`` prints what a model folder lacks.

tests/test_docs.py runs it on every folder of ``jaxmodels/`` that holds a model.py.
"""

import importlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AXES = {"layers", "vocab", "embed", "heads", "mlp", "expert", None}
CONVERSION = ("MODEL_TYPES", "config_from_hf", "config_to_hf", "entries")
COLUMNS = ("loads", "parity", "trains", "multi-device", "hardware")
PLACES = r"\b(Mesh|NamedSharding|PartitionSpec|device_put|jax\.devices|default_backend)\b"


def models() -> list[str]:
    """Every folder of jaxmodels/ that holds a model."""
    return sorted(path.parent.name for path in (ROOT / "jaxmodels").glob("*/model.py"))


def lacks(name: str) -> list[str]:
    """What the model's folder, tests and configs lack; empty if nothing."""
    folder = ROOT / "jaxmodels" / name
    found = [f"{folder / file} does not exist" for file in ("model.py", "convert.py", "README.md")
             if not (folder / file).exists()]
    if found:
        return found
    for path in folder.rglob("*.py"):
        if (lines := path.read_text().count("\n")) > 700:
            found.append(f"{path.name} has {lines} lines; 700 are the limit")
    if place := re.search(PLACES, (folder / "model.py").read_text()):
        found.append(f"model.py names {place[0]}; a model knows no mesh, device or backend")
    convert = importlib.import_module(f"jaxmodels.{name}.convert")
    missing = [what for what in CONVERSION if not hasattr(convert, what)]
    if missing:
        return [*found, f"convert.py has no {', '.join(missing)}"]
    return found + _readme(name, folder, convert) + _golden(name, convert) + _parameters(name)


def _readme(name: str, folder: Path, convert) -> list[str]:
    text = (folder / "README.md").read_text()
    found = [f"README.md has no column {column!r} in a status matrix" for column in COLUMNS
             if not re.search(rf"^\|.*\b{column}\b.*\|$", text, re.MULTILINE)]
    found += [f"README.md does not mention {kind!r}" for kind in convert.MODEL_TYPES if f"`{kind}`" not in text]
    if not re.search(r"arXiv|doi\.org", text):
        found.append("README.md cites no paper")
    configs = re.findall(r"configs/\w+(?:/\w+)*\.py", text)
    if not any((ROOT / path).exists() for path in configs):
        found.append("README.md names no experiment of configs/ that exists")
    return found


def _golden(name: str, convert) -> list[str]:
    """Golden files of every family, and a test that reads them."""
    golden = ROOT / "tests" / "golden"
    covered = {json.loads(path.read_text()).get("model_type") for path in golden.glob("*.json")
               if path.with_suffix(".npz").exists()}
    found = [f"tests/golden has no files of {kind!r}" for kind in sorted(set(convert.MODEL_TYPES) - covered)]
    if not (ROOT / "tests" / f"test_{name}_golden.py").exists():
        found.append(f"tests/test_{name}_golden.py does not exist")
    return found


def _parameters(name: str) -> list[str]:
    """``tiny()`` builds, is small, every parameter names its axes, and the conversion covers every parameter."""
    from flax import nnx

    model = importlib.import_module(f"jaxmodels.{name}.model")
    classes = [cls for cls in vars(model).values() if isinstance(cls, type) and hasattr(model, f"{cls.__name__}Config")]
    if len(classes) != 1:
        return [f"model.py must hold one class with a {classes[0].__name__ if classes else 'Name'}Config beside it"]
    config = getattr(model, f"{classes[0].__name__}Config")
    if not hasattr(config, "tiny"):
        return [f"{config.__name__} has no tiny()"]
    state = nnx.state(nnx.eval_shape(lambda: classes[0](config.tiny(), rngs=nnx.Rngs(0))))
    flat = dict(nnx.to_flat_state(state))
    found, size = [], 0
    for path, variable in flat.items():
        value, names = variable.get_value(), variable.get_metadata().get("out_sharding")  # shapes: nothing is allocated
        size += value.size
        if names is None or len(names) != value.ndim:
            found.append(f"parameter {path} of shape {value.shape} has axis names {names}")
        elif set(names) - AXES:
            found.append(f"parameter {path} has axis names {set(names) - AXES}; use {sorted(filter(None, AXES))}")
    if size > 1_000_000:
        found.append(f"tiny() has {size} parameters; it should run in milliseconds")
    entries = importlib.import_module(f"jaxmodels.{name}.convert").entries(config.tiny())
    if {entry.path for entry in entries} != set(flat):
        found.append("entries(tiny()) and the parameters of the model are not the same")
    return found


def main(names: list[str]) -> int:
    wrong = 0
    for name in names or models():
        problems = lacks(name)
        wrong += len(problems)
        print(*(f"{name}: {problem}" for problem in problems or ["complete"]), sep="\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
