"""Documents with packages: the Python standard library of this machine, or your own folder of text files.

* ``python``: the source code of the standard library, 7.8 MB in Python 3.11: real text on a machine without a network;
* ``path:DIR``: the ``*.py``, ``*.txt`` and ``*.md`` files under DIR.

Whole packages are held out, by a hash of their name, so that no file of a validation package was trained on and a new
package moves no other one. Licence of ``python``: PSF-2.0; it is read where it is installed, nothing is copied.
"""

import dataclasses
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from jaxmodels.errors import UserError
from train.data.text import decode
from train.runtime.config import did_you_mean

SPLITS = ("train", "validation")

# Machines differ in whether they carry these (Debian packages them apart; 3.12 and 3.13 removed two), so a run on
# another machine would see other documents. `encodings` and `pydoc_data` are generated tables rather than code.
_LEFT_OUT = {
    *("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"),
    *("idlelib", "turtledemo", "tkinter", "lib2to3", "distutils", "ensurepip", "encodings", "pydoc_data"),
}
_OF_THIS_BUILD = ("config-", "_sysconfigdata")  # paths and compiler flags of one machine
_TEXT_ENDINGS = {".py", ".txt", ".md"}

_HELD_OUT = 1 / 16  # of packages
# Chosen so that 6 % of the bytes are held out in each of Python 3.11 to 3.13, in packages of every kind and none large
# (re, pathlib, json, xmlrpc, tempfile, dis ...); most other salts hold out 2 to 12 %.
_SALT = "103"


@dataclasses.dataclass(frozen=True)
class Document:
    """One file; `name` is its path below the folder of the source."""

    name: str
    package: str
    text: str = dataclasses.field(repr=False)


def documents(source: str, split: str) -> list[Document]:
    """Documents of one split of a source, sorted by name; files without text are left out.

    Args:
      source: ``python`` or ``path:DIR``.
      split: ``train`` or ``validation``; together they are the whole source.
    Files that are not UTF-8 are left out with one warning that counts and names them.
    Raises UserError for an unknown source or split, and where a split is empty.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; {did_you_mean(split, SPLITS)}")
    kind, _, rest = source.partition(":")
    if source == "python":
        folder = Path(sysconfig.get_path("stdlib"))
        paths = _library_files(folder)
    elif kind == "path" and rest:
        folder = Path(rest).expanduser()
        if not folder.is_dir():
            raise UserError(f"{source}: {folder} is not a folder; give one that holds .py, .txt or .md files")
        paths = _text_files(folder)
    else:
        raise UserError(f"unknown source of documents {source!r}; {did_you_mean(source, ['python', 'path:DIR'])}")
    every = _read(folder, paths, source)
    if not every:
        raise UserError(f"{source}: no text in {folder}; it needs {', '.join(sorted(_TEXT_ENDINGS))} files in UTF-8")
    held = held_out({one.package for one in every})
    chosen = [one for one in every if (one.package in held) == (split == "validation")]
    if not chosen:
        package = every[0].package
        raise UserError(f"{source}: nothing to hold out of one package ({package}); give two sub folders or files")
    return chosen


def held_out(packages: set[str]) -> set[str]:
    """The packages of the validation split: a sixteenth by hash, and at least one of two or more."""
    shares = {package: _share(package) for package in packages}
    held = {package for package, share in shares.items() if share < _HELD_OUT}
    if not held and len(packages) > 1:
        held = {min(shares, key=shares.__getitem__)}
    return held if len(held) < len(packages) else set()


def _share(package: str) -> float:
    digest = hashlib.blake2b(f"{_SALT}:{package}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _library_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).parts
        if not _LEFT_OUT & {*parts, path.stem} and not parts[0].startswith(_OF_THIS_BUILD) and not path.is_symlink():
            yield path  # Debian links sitecustomize.py to /etc


def _text_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)  # .git, .venv
        if path.suffix in _TEXT_ENDINGS and not hidden and path.is_file():
            yield path


def _read(folder: Path, paths: Iterator[Path], source: str) -> list[Document]:
    found, bad = [], []
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in paths):
        text, replaced = decode(path.read_bytes())
        if replaced:  # another encoding: replaced characters would be learned
            bad.append(name)
        elif text.strip():
            first, inside, _ = name.partition("/")
            found.append(Document(name, first if inside else Path(first).stem, text))
    if bad:
        told = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        warnings.warn(f"{source}: {len(bad)} files are not UTF-8 and are left out: {told}", stacklevel=3)
    return found
