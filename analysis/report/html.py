"""A self-contained HTML page: sections of text, cards, tables and figures; nothing is fetched when it is opened."""

import base64
import csv
import datetime
import hashlib
import io
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from train.runtime.files import write_atomic

HERE = Path(__file__).parent


class Report:
    """Collects blocks in order, then `save`s one file. All strings given are text and are escaped."""

    def __init__(self, title: str, subtitle: str = ""):
        self.title, self.subtitle = str(title), str(subtitle)
        self._sections: list[dict[str, Any]] = []
        self._figures = 0

    def section(self, title: str, intro: str = "") -> None:
        """Begin a section; what follows belongs to it. It is listed in the contents."""
        self._sections.append({"title": str(title), "id": f"s{len(self._sections) + 1}", "blocks": []})
        if intro:
            self.text(intro)

    def text(self, text: str) -> None:
        """Paragraphs in a little markdown: **bold**, *italic*, `code`, "- " lists, [words](https://... or #s1)."""
        self._add("text", html=markdown(text))

    def number_cards(self, cards: Iterable[tuple]) -> None:
        """A row of (label, value, note) cards; the note may be left out."""
        cards = [(*card, "")[:3] for card in cards]
        self._add("cards", cards=[(str(label), display(value), str(note or "")) for label, value, note in cards])

    def table(
        self,
        rows: Iterable[Mapping[str, Any] | Sequence[Any]],
        columns: Sequence[str] | Mapping[str, str] | None = None,
        caption: str = "",
        name: str = "table",
    ) -> None:
        """A table that sorts by a click on a heading, and downloads as `name`.csv.

        rows: mappings, or sequences in the order of columns. columns: keys, or key -> heading; default: all keys of
        the rows. Numbers are shown with four significant digits, right-aligned; the download has them in full.
        """
        rows = list(rows)
        if columns is None:
            columns = list(dict.fromkeys(key for row in rows for key in row)) if _mappings(rows) else []
            columns = columns or [str(i) for i in range(max(map(len, rows), default=0))]
        keys, heads = list(columns), [str(h) for h in (columns.values() if isinstance(columns, Mapping) else columns)]
        values = [[row.get(key) for key in keys] if isinstance(row, Mapping) else list(row) for row in rows]
        numeric = [
            any(_is_number(row[i]) for row in values) and all(_is_number(row[i]) or row[i] is None for row in values)
            for i in range(len(keys))
        ]
        cells = [[(display(value), raw(value)) for value in row] for row in values]
        self._add(
            "table",
            heads=list(zip(heads, numeric, strict=True)),
            rows=cells,
            numeric=numeric,
            caption=str(caption),
            download=download(heads, values),
            name=file_name(name),
        )

    def code(self, text: str, caption: str = "") -> None:
        """Text as it is, in a fixed-width font: programs, samples of a model."""
        self._add("code", text=str(text), caption=str(caption))

    def coloured(self, pieces: Sequence[str], values: Sequence[float], caption: str = "",
                 marked: Collection[int] = ()) -> None:
        """Text of which every piece (a residue, a token) has a colour: orange for its value above 0, blue for below.

        Full colour is at the largest absolute value; each value is told where the pointer rests. marked: places of the
        pieces that are underlined.
        """
        largest = max((abs(value) for value in values), default=0) or 1
        self._add("coloured", caption=str(caption), pieces=[
            (str(piece), "a" if value > 0 else "b", round(100 * abs(value) / largest), f"{i + 1}: {display(value)}",
             i in marked) for i, (piece, value) in enumerate(zip(pieces, values, strict=True))])

    def figure(self, figure: Any, caption: str = "", data: Any = None, name: str = "figure", alt: str = "") -> None:
        """A matplotlib Figure, inline as SVG, or as PNG where the SVG would be heavy.

        data: the numbers shown, downloadable as `name`.csv: mappings (one a row) or a mapping of equal-length columns.
        alt: what the figure shows, for those who cannot see it; default: the caption.
        """
        from analysis.report import style

        self._figures += 1
        block = {"caption": str(caption), "name": file_name(name), "svg": None, "png": None, "download": None}
        svg = style.to_svg(figure, f"f{self._figures}", alt or caption)
        if len(svg) <= style.HEAVY:
            block["svg"] = Markup(svg)
        else:
            block["png"], block["width"] = style.to_png(figure)
        if data is not None:
            block["download"] = download(*_columns(data))
        self._add("figure", alt=str(alt or caption), **block)

    def render(self) -> str:
        """The page."""
        import jinja2

        loader = jinja2.FileSystemLoader(HERE)
        environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
        script = (HERE / "report.js").read_text(encoding="utf-8")
        return environment.get_template("template.html").render(
            title=self.title,
            subtitle=self.subtitle,
            sections=self._sections,
            contents=[section for section in self._sections if section["title"]],
            style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        )

    def save(self, path: str | Path) -> Path:
        """Write the page, whole or not at all."""
        page = self.render().encode("utf-8", errors="replace")
        return write_atomic(Path(path), lambda file: file.write(page))

    def _add(self, kind: str, **block: Any) -> None:
        if not self._sections:
            self._sections.append({"title": "", "id": "s0", "blocks": []})
        self._sections[-1]["blocks"].append({"kind": kind, **block})


def markdown(text: str) -> Markup:
    """A little markdown, escaped first: whatever the text holds, only the tags made here come out."""
    blocks = []
    for block in re.split(r"\n\s*\n", str(text).strip()):
        block = " ".join(line.strip() for line in re.split(r"\n(?!\s*- )", block)).strip()  # an item may take lines
        lines = [line.strip() for line in block.splitlines()]
        if block.startswith("- "):
            blocks.append("<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>")
        elif block:
            blocks.append(f"<p>{_inline(' '.join(lines))}</p>")
    return Markup("\n".join(blocks))


def _inline(text: str) -> str:
    codes: list[str] = []

    def keep(match: re.Match) -> str:
        codes.append(match[1])
        return f"\x00{len(codes) - 1}\x00"

    text = re.sub(r"`([^`]+)`", keep, str(escape(text.replace("\x00", ""))))
    text = re.sub(r"\[([^\]]+)\]\((https://[^\s()]+|#[\w-]+)\)", r'<a href="\2" rel="noreferrer">\1</a>', text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])", r"<em>\1</em>", text)
    return re.sub(r"\x00(\d+)\x00", lambda match: f"<code>{codes[int(match[1])]}</code>", text)


def display(value: Any) -> str:
    """As a reader wants it: four significant digits, thousands apart, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if not _is_number(value):
        return str(value)
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,}".replace(",", "\u202f").replace("-", "−")
    value = float(value)
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        mantissa, exponent = f"{value:.3e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    else:
        text = f"{value:,.0f}" if abs(value) >= 9999.5 else f"{value:.4g}"
    return text.replace(",", "\u202f").replace("-", "−")


def percent(share: float) -> str:
    """0.125 as 12.5%: as many digits as it takes to tell shares apart."""
    return f"{100 * share:.6g}%"


def raw(value: Any) -> str:
    """In full, for sorting and for the download: reading it back gives the same number."""
    if value is None:
        return ""
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value)).lower()
    if isinstance(value, np.floating) and value.dtype.itemsize < 8:
        return str(value)  # the shortest decimal that gives the same narrow float
    return repr(float(value)) if isinstance(value, (float, np.floating)) else str(value)


def download(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A data: URI of a CSV file, with the mark by which spreadsheets know UTF-8."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\r\n")
    writer.writerow(heads)
    writer.writerows([raw(value) for value in row] for row in rows)
    text = "\ufeff" + buffer.getvalue()
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.encode("utf-8", errors="replace")).decode()


def file_name(name: str) -> str:
    """A name that is safe as a file's."""
    return re.sub(r"[^\w.-]+", "-", str(name)).strip("-.") or "data"


def _columns(data: Any) -> tuple[list[str], list[list[Any]]]:
    if isinstance(data, Mapping):
        return [str(key) for key in data], [list(row) for row in zip(*data.values(), strict=True)]
    rows = list(data)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [str(key) for key in keys], [[row.get(key) for key in keys] for row in rows]


def _mappings(rows: list) -> bool:
    return bool(rows) and all(isinstance(row, Mapping) for row in rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, (bool, np.bool_))
