"""Where the data of a named source lie: an explicit path, ``$JAXMODELS_DATA/<name>``, an installed package.

Nothing is downloaded or stored here (architecture.md section 5); what is missing gives an error that says where to get
it and where to put it.
"""

import dataclasses
import hashlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmodels.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """A source that has one public home."""

    name: str
    license: str
    get: str  # how to get it, and from where
    read: Callable[[Path, str, str], Any]  # (path, source, license)
    package: str = ""  # an installed package that carries it
    checksum: tuple[str, str] | None = None  # (file, SHA-256): what the recorded results were computed from


def locate(source: Source, rest: str = "") -> Path | None:
    """Where a source lies; None if it is missing. rest: an explicit path, which is then looked at alone."""
    if rest:
        path = Path(rest).expanduser()
        return path if path.exists() else None
    if data := os.environ.get("JAXMODELS_DATA"):
        path = Path(data).expanduser() / source.name
        if path.exists():
            return path
    spec = importlib.util.find_spec(source.package) if source.package else None  # without importing it
    return Path(spec.origin).parent if spec and spec.origin else None


def read(source: Source, name: str) -> Any:
    """What `source.read` makes of it. name: as the user wrote it, ``udhr`` or ``udhr:PATH``.

    Raises UserError for a source that is not here, saying where to get it and where to put it.
    """
    rest = name.partition(":")[2]
    path = locate(source, rest)
    if path is None:
        home = f"$JAXMODELS_DATA/{source.name} (JAXMODELS_DATA is {os.environ.get('JAXMODELS_DATA', 'not set')})"
        raise UserError(f"{name} is not here; get it with {source.get} and put it into {rest or home}")
    _check(source, path)
    return source.read(path, name, source.license)


def _check(source: Source, path: Path) -> None:
    """Warns, since newer data is still data, when a file is not the one that recorded results were computed from."""
    if source.checksum is None:
        return
    file = path / source.checksum[0] if path.is_dir() else path
    if file.name == source.checksum[0] and file.exists():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != source.checksum[1]:
            warnings.warn(f"{file} is not the recorded version (SHA-256 {digest[:12]}): numbers differ", stacklevel=4)
