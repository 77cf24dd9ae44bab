"""The file that says which experts or neurons stay, of ``jaxmodels prune --keep FILE``."""

from zipfile import BadZipFile

import numpy as np

from jaxmodels.errors import UserError


def read_keep(path: str) -> np.ndarray:
    """bool[layers, experts] or bool[layers, neurons], of an .npy file or an .npz with one array.

    Raises UserError for a file that cannot be read or holds something else.
    """
    try:
        keep = np.load(path, allow_pickle=False)
        if isinstance(keep, np.lib.npyio.NpzFile):
            if len(keep.files) != 1:
                raise UserError(f"{path} holds {', '.join(keep.files) or 'nothing'}; it must hold one array")
            keep = keep[keep.files[0]]
        if not isinstance(keep, np.ndarray):  # what is no .npy in a zip comes as its bytes
            raise ValueError("what the zip holds is no .npy")
    except UserError:
        raise
    except (OSError, ValueError, EOFError, MemoryError, BadZipFile) as error:  # what damaged files end in
        raise UserError(f"cannot read {path} as .npy or .npz: {error}") from error
    if keep.ndim != 2 or keep.dtype != bool:
        raise UserError(f"{path} holds {keep.dtype}{list(keep.shape)}; it must hold bool[layers, experts] or "
                        "bool[layers, neurons]")
    return keep
