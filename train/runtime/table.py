"""Tables on stdout, for people and for pipes."""

import sys
from collections.abc import Sequence


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """A rich table on a terminal; piped, columns padded to their widest cell and never cut."""
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*rows[0], box=box.SIMPLE)
    for row in rows[1:]:
        table.add_row(*map(Text, row))  # Text: brackets in a type are not markup
    Console().print(table)
