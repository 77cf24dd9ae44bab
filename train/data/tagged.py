"""Named sources of sentences with entities, split into train, dev and test.

* ``bc5cdr``, ``ncbi_disease``, ``craft``, ``wnut17``: the corpora of ner_active_learning.md section 10;
* ``path:FOLDER``: your own files, one a part, named by it (train.conll, dev.jsonl, test.tsv.gz ...), or folders of brat
  of those names; ``path:FILE``: one file, cut into parts.

Parts that are missing are cut from train by a hash of each sentence, so the same sentence always lands in the same.
"""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxmodels.errors import UserError
from train.data.conll import Repair, Sentence, read_conll
from train.data.locate import Source, read
from train.data.spans import read_brat, read_jsonl
from train.runtime.config import did_you_mean

PARTS = ("train", "dev", "test")
NAMES = {"train": "train", "dev": "dev", "devel": "dev", "valid": "dev", "validation": "dev", "testa": "dev",
         "test": "test", "testb": "test"}
CUT = {"dev": 0.1, "test": 0.1}  # shares of train that become a part which is missing
_CONVERSION = "conversion CC BY 4.0 (cambridgeltl/MTL-Bioinformatics-2016)"


@dataclasses.dataclass(frozen=True)
class TaggedTexts:
    """parts: train, dev, test -> sentences, none empty. types: those of train, sorted. counts: sentences, words and
    entities of each part, and what was amiss."""

    parts: Mapping[str, Sequence[Sentence]]
    types: tuple[str, ...]
    counts: Mapping[str, int]
    license: str = ""

    @property
    def words(self) -> int:
        """In the training part."""
        return sum(map(len, self.parts["train"]))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of all sentences and their tags."""
        every = {part: [(tuple(one.words), tuple(one.tags)) for one in self.parts[part]] for part in PARTS}
        return hashlib.sha256(repr(every).encode()).hexdigest()


def tagged_texts(name: str, *, illformed: Repair = "repair", limit: int | None = None) -> TaggedTexts:
    """The sentences of a source. limit: of each part at most so many, the first.

    Raises UserError for an unknown name, a source that is not here (saying where to get it) and a damaged file.
    """
    kind, _, rest = name.partition(":")
    counts: Counter[str] = Counter()
    license = ""
    if kind == "path" and rest:
        files = _own(Path(rest).expanduser())
    elif kind in SOURCES:
        files, license = read(SOURCES[kind], name)
    else:
        raise UserError(f"unknown source of tagged sentences {name!r}; {did_you_mean(kind, [*SOURCES, 'path:FOLDER'])}")
    parts = {part: [one for one in _read(path, illformed, counts) if one.words] for part, path in files.items()}
    parts = _complete(name, parts, counts)
    if limit is not None:
        parts = {part: sentences[:limit] for part, sentences in parts.items()}
    types = sorted({tag[2:] for one in parts["train"] for tag in one.tags if tag != "O"})
    if not types:
        raise UserError(f"{name}: the training part has no entity; give sentences with tags")
    counts["types_not_in_train"] = len({tag[2:] for part in PARTS for one in parts[part] for tag in one.tags
                                        if tag != "O"} - set(types))
    for part, sentences in parts.items():
        counts[f"{part}_sentences"] = len(sentences)
        counts[f"{part}_words"] = sum(map(len, sentences))
        counts[f"{part}_entities"] = sum(tag[0] == "B" for one in sentences for tag in one.tags)
    return TaggedTexts(parts, tuple(types), dict(counts), license)


def _own(path: Path) -> dict[str, Path]:
    """part -> file or folder of brat."""
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a folder with train, dev and test files, or one file")
    files: dict[str, Path] = {}
    for entry in sorted(path.iterdir()):
        part = NAMES.get(entry.name.split(".")[0].lower())
        if part is None:
            continue
        if part in files:
            raise UserError(f"{path} has {files[part].name} and {entry.name}, both of the {part} part; keep one")
        files[part] = entry
    if "train" not in files:
        if any(path.glob("*.ann")):
            return {"train": path}
        raise UserError(f"{path} has no file of the training part; name one train.conll, train.tsv or train.jsonl")
    return files


def _read(path: Path, illformed: Repair, counts: Counter[str]) -> list[Sentence]:
    if path.is_dir():
        return read_brat(path, counts)
    if path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson", ".json")):
        return read_jsonl(path, counts)
    return read_conll(path, illformed, counts)


def _complete(name: str, parts: Mapping[str, list[Sentence]], counts: Counter[str]) -> dict[str, list[Sentence]]:
    missing = [part for part in PARTS if part not in parts]
    if not missing:
        whole = {part: parts[part] for part in PARTS}
    else:
        whole = {part: list(parts.get(part, ())) for part in PARTS if part != "train"} | {"train": []}
        ends, end = {}, 0.0
        for part in missing:
            end += CUT[part]
            ends[part] = end
        for one in parts["train"]:
            digest = hashlib.sha256("\t".join(one.words).encode()).digest()
            place = int.from_bytes(digest[:8]) / 2 ** 64
            whole[next((part for part, end in ends.items() if place < end), "train")].append(one)
        counts["parts_cut_from_train"] = len(missing)
    if empty := next((part for part in PARTS if not whole[part]), None):
        raise UserError(f"{name}: the {empty} part has no sentence; give more, or a file of that name")
    return {part: whole[part] for part in PARTS}


def _corpus(path: Path, name: str, license: str) -> tuple[dict[str, Path], str]:
    files = {part: path / f"{part}.conll.gz" for part in PARTS}
    files = {part: file if file.exists() else file.with_suffix("") for part, file in files.items()}
    if lost := next((file for file in files.values() if not file.exists()), None):
        raise UserError(f"{name}: {lost} is missing; put {', '.join(PARTS)}.conll.gz there")
    return files, license


def _source(name: str, license: str, get: str, read: Callable = _corpus) -> Source:
    return Source(f"ner_{name}", license, get, read)


_MTL = "the {}-IOB folder of https://github.com/cambridgeltl/MTL-Bioinformatics-2016 (train, devel as dev, test)"
SOURCES = {
    "bc5cdr": _source("bc5cdr", f"public domain notice of the NLM; {_CONVERSION}", _MTL.format("data/BC5CDR")),
    "ncbi_disease": _source("ncbi_disease", f"public domain notice of the NLM; {_CONVERSION}",
                            _MTL.format("data/NCBI-disease")),
    "craft": _source("craft", f"CC BY 3.0; {_CONVERSION}", _MTL.format("data/CRAFT")),
    "wnut17": _source("wnut17", "CC BY 4.0", "https://github.com/leondz/emerging_entities_17 (wnut17train.conll, "
                      "emerging.dev.conll, emerging.test.annotated)"),
}
