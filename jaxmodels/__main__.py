"""``python -m jaxmodels``: the command, for where it is not on the PATH."""

from jaxmodels.cli import entry

entry()
