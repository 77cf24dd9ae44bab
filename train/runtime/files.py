"""Files that are either whole or absent: write beside, flush to disk, rename over."""

import contextlib
import json
import math
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxmodels.errors import UserError


class CannotSave(UserError):
    """The disk refused (full, read-only, gone); what was saved before is whole. Exit code 74."""

    exit_code = 74


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Calls ``write(file)`` on a new file that then takes the place of `path`, at once and for good.

    A reader, and a run that is killed at any moment, sees the old file or the new one, never half of one.
    Raises CannotSave when the disk refuses; the old file stays.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp gives 0600; a run folder is for colleagues too
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise CannotSave(f"cannot write {path}: {error.strerror or error}; free space or choose --out") from error
        raise
    return path


def write_json(path: Path, value: Any) -> Path:
    """Atomically writes `value` as JSON that any reader takes (see `plain`)."""
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return write_atomic(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`; None if the file is absent. Raises UserError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it or choose another --out") from error


def save_npz(path: Path, arrays: dict[str, Any]) -> Path:
    """Atomically writes named arrays. Raises TypeError for dtypes that do not come back as they are (bfloat16)."""
    host = {name: np.asarray(value) for name, value in arrays.items()}
    for name, value in host.items():
        if value.dtype.hasobject or value.dtype.kind == "V":
            raise TypeError(f"{name}: a {value.dtype} array does not survive .npz; convert it to float32 first")
    return write_atomic(path, lambda file: np.savez(file, **host))


def load_npz(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays in `path`, all in memory; None, with a warning, if it is damaged, so that the unit is recomputed."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:  # reading checks the CRC of every member
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, KeyError, AttributeError) as error:
        warnings.warn(f"{path} is damaged ({type(error).__name__}: {error}); it is computed again", stacklevel=3)
        return None


def plain(value: Any) -> Any:
    """`value` as JSON types: arrays become lists, scalars numbers, paths text; nan and infinity become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        return plain(value.tolist())
    return str(value)


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut; some network file systems cannot and say so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
