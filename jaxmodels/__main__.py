"""``python -m jaxmodels``: the command, for where it is not on the PATH."""

from jaxmodels.cli import entry

if __name__ == "__main__":  # importing every module must not run it
    entry()
