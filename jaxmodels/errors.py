"""Errors that a user can act on: one line, an exit code, no traceback (architecture.md section 4)."""


class UserError(ValueError):
    """Bad input. The message is one line that names the value, the limit and the remedy; exit code 2."""

    exit_code = 2


class Interrupted(Exception):
    """A signal asked the run to stop and everything finished so far is on disk; exit code 75."""

    exit_code = 75
