"""Named sources of proteins: sequences to pre-train on, and enzymes with EC numbers.

* ``uniprot20k``: 20,426 UniProt entries (MMseqs2's example data), 19,188 distinct sequences, no labels;
* ``enzyme_ec``: enzymes with EC numbers, split by clusters at 30 % identity: train, valid, near_eval, test;
* ``nrpdb_ec``: the test chains of DeepFRI's benchmark, several EC terms each, with five identity strata;
* ``care_task1``: CARE's two test sets, splits ``30`` and ``30-50`` (% identity to CARE's training set);
* ``path:FILE``: your own FASTA file, plain or gzip.

``NAME:PATH`` looks at PATH alone (the file or its folder). See `train.data.locate` for where a name is looked up.
Sequences are cleaned as ``jaxmodels.esm.fasta.clean`` says; what was changed or left out is counted and returned.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from jaxmodels.errors import UserError
from jaxmodels.esm.fasta import clean, read_fasta
from train.data.locate import Source, read
from train.data.tables import one, table
from train.runtime.config import did_you_mean

STRATA = ("le30", "le40", "le50", "le70", "le95")  # nrpdb_ec: below so many % identity to DeepFRI's training chains
CARE_FILES = {"30": "30_protein_test.csv", "30-50": "30-50_protein_test.csv"}
_FASTA = (".fasta", ".fa", ".faa", ".fasta.gz", ".fa.gz", ".faa.gz")


@dataclasses.dataclass(frozen=True)
class Protein:
    """One protein. ec: EC numbers of three or four levels; strata: the identity strata that it belongs to."""

    name: str
    sequence: str = dataclasses.field(repr=False)
    ec: tuple[str, ...] = ()
    split: str = ""
    strata: tuple[str, ...] = ()

    @property
    def top(self) -> tuple[int, ...]:
        """Its top-level EC classes, 1 to 7, sorted."""
        return tuple(sorted({int(number.split(".")[0]) for number in self.ec}))


class Proteins(NamedTuple):
    """What a source holds, and counts of what was changed or left out on the way (`empty`, `unknown` ...)."""

    proteins: list[Protein]
    counts: dict[str, int]


def protein_source(name: str) -> Proteins:
    """The proteins of a source, in its order; entries without a residue are left out and counted.

    Raises UserError for an unknown name, a source that is not here (saying where to get it) and a damaged file.
    """
    kind, _, rest = name.partition(":")
    if kind == "path" and rest:
        path = Path(rest).expanduser()
        if path.is_dir():
            raise UserError(f"{name}: {path} is a folder; give one FASTA file")
        return _from_fasta([path])
    if kind not in SOURCES:
        raise UserError(f"unknown source of proteins {name!r}; {did_you_mean(kind, [*SOURCES, 'path:FILE'])}")
    return read(SOURCES[kind], name)


def distinct(proteins: Iterable[Protein]) -> list[Protein]:
    """The first protein of every sequence."""
    first: dict[str, Protein] = {}
    for protein in proteins:
        first.setdefault(protein.sequence, protein)
    return list(first.values())


def crops(sequence: str, longest: int) -> list[str]:
    """A protein in pieces of nearly equal length, none longer than `longest` residues, nothing left out.

    Pieces rather than one random crop an epoch: rows are packed once, and every residue is read.
    """
    count = max(-(-len(sequence) // longest), 1)
    ends = [len(sequence) * i // count for i in range(count + 1)]
    return [sequence[start:end] for start, end in zip(ends, ends[1:], strict=False)]


# Readers


def _read_uniprot(path: Path, name: str, license: str) -> Proteins:
    tables, fastas = _files(path, (".tsv", ".tsv.gz")), _files(path, _FASTA)
    if tables:
        return _collect((row["accession"], row["sequence"], {}) for row in table(tables[0], ("accession", "sequence")))
    if fastas:
        return _from_fasta(fastas)
    raise UserError(f"{name}: {path} holds neither uniprot20k.tsv.gz nor FASTA files; put one of them there")


def _read_enzymes(path: Path, name: str, license: str) -> Proteins:
    rows = table(one(path, "enzyme_ec.tsv.gz", name), ("id", "ec", "split", "sequence"))
    return _collect((row["id"], row["sequence"], {"ec": _numbers(row["ec"]), "split": row["split"]}) for row in rows)


def _read_chains(path: Path, name: str, license: str) -> Proteins:
    rows = table(one(path, "test_sequences.tsv.gz", name), ("pdb_chain", "ec", "sequence", *STRATA))

    def fields(row: Mapping[str, str]) -> dict:
        strata = tuple(stratum for stratum in STRATA if row[stratum] == "1")
        return {"ec": _numbers(row["ec"]), "split": "test", "strata": strata}

    return _collect((row["pdb_chain"], row["sequence"], fields(row)) for row in rows)


def _read_care(path: Path, name: str, license: str) -> Proteins:
    def rows() -> Iterator[tuple[str, str, dict]]:
        for split, file in CARE_FILES.items():
            for row in table(one(path, file, name), ("Entry", "Sequence", "EC number"), ","):
                yield row["Entry"], row["Sequence"], {"ec": _numbers(row["EC number"], ";"), "split": split}

    return _collect(rows())


SOURCES = {
    source.name: source
    for source in (
        Source("uniprot20k", "CC BY 4.0 (UniProt)",
               "DB.fasta.gz and QUERY.fasta.gz of MMseqs2's examples (https://github.com/soedinglab/MMseqs2, Debian "
               "package mmseqs2-examples)", _read_uniprot,
               checksum=("uniprot20k.tsv.gz", "d8b93e82671863fb08c36554839eea415bb703b01bf00b58ba4433a1f4f1bebd")),
        Source("enzyme_ec", "CC BY 4.0 (UniProt), CC0 (PDB), BSD-3 (DeepFRI), MIT (CARE)",
               "the recipe of docs/proteins.md (enzyme_ec.tsv.gz: columns id, ec, split, sequence)", _read_enzymes,
               checksum=("enzyme_ec.tsv.gz", "9563556bdd417e56a8281ed81e2d74f3f83d6c82eba32b0fff1b54dae019180d")),
        Source("nrpdb_ec", "BSD-3 (DeepFRI), CC0 (PDB)",
               "preprocessing/data of https://github.com/flatironinstitute/DeepFRI (docs/proteins.md: as one table)",
               _read_chains,
               checksum=("test_sequences.tsv.gz", "d1d5e34b638da82699d8729a67316fabebfab350993d79b693b5802ff55ef98d")),
        Source("care_task1", "MIT (CARE), CC BY 4.0 (UniProt)",
               f"splits/task1/{CARE_FILES['30']} and {CARE_FILES['30-50']} of https://github.com/jsunn-y/CARE",
               _read_care,
               checksum=(CARE_FILES["30"], "3a5ee217d18caa10bccbf4162bf5de7dd5b72cc58f6347839562b408d50ca949")),
    )
}


def _from_fasta(paths: Iterable[Path]) -> Proteins:
    return _collect((record.name, record.sequence, {}) for path in paths for record in read_fasta(path))


def _collect(rows: Iterable[tuple[str, str, Mapping]]) -> Proteins:
    """Rows of (name, sequence as written, further fields) as cleaned proteins."""
    found, counts = [], Counter()
    for name, text, fields in rows:
        sequence, changed = clean(text)
        counts.update(changed)
        counts["records"] += 1
        if sequence.strip("X"):
            found.append(Protein(name, sequence, **fields))
        else:
            counts["empty"] += 1  # nothing, or nothing but unknown residues
    counts["residues"] = sum(len(protein.sequence) for protein in found)
    counts["odd_residues"] = sum(protein.sequence.count(letter) for protein in found for letter in "XBUZO")
    return Proteins(found, dict(counts))


def _numbers(text: str, separator: str = ",") -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(separator) if part.strip())


def _files(path: Path, endings: tuple[str, ...]) -> list[Path]:
    every = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in every if file.name.endswith(endings)]
