"""Where this library keeps what it can make again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$JAXMODELS_CACHE, else ``jaxmodels`` in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("JAXMODELS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmodels"
