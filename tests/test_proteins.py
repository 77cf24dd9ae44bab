"""Sources of proteins, families that are held out, rows of whole proteins, length buckets."""

import gzip

import numpy as np
import pytest

from jaxmodels.errors import UserError
from jaxmodels.esm.alphabet import CLS, EOS, PAD, encode
from train.data.buckets import LENGTHS, bucketed
from train.data.families import families, hold_out
from train.data.packing import pack_whole
from train.data.proteins import Protein, crops, distinct, protein_source
from train.data.sources import is_source, where

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def some_sequences(count, low=20, high=200, seed=0):
    r = np.random.default_rng(seed)
    return ["".join(r.choice(list(RESIDUES), r.integers(low, high))) for _ in range(count)]


def test_a_fasta_file_is_cleaned_and_what_was_done_is_counted(tmp_path):
    path = tmp_path / "mine.fasta"
    path.write_text(">a\nMKVLA\n>b empty\n>c unknown only\nXXX\n>d\nmk-vJ*\n>e\nMKVLA\n")
    proteins, counts = protein_source(f"path:{path}")
    assert [(p.name, p.sequence) for p in proteins] == [("a", "MKVLA"), ("d", "MKVX"), ("e", "MKVLA")]
    assert counts == {"records": 5, "empty": 2, "lower_case": 3, "gaps": 1, "unknown": 1, "stops": 1, "residues": 14,
                      "odd_residues": 1}
    assert [p.name for p in distinct(proteins)] == ["a", "d"]


def test_tables_are_read_as_they_are_documented(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXMODELS_DATA", str(tmp_path))
    (tmp_path / "enzyme_ec").mkdir()
    with gzip.open(tmp_path / "enzyme_ec/enzyme_ec.tsv.gz", "wt") as file:
        file.write('id\tec\tsplit\tsequence\nP1\t1.1.1.-,1.1.1.1\ttrain\tMKV\nQ"2\t2.7.1.1,3.1.1.1\ttest\tMKL\n')
    with pytest.warns(UserWarning, match="not the recorded version"):
        one, two = protein_source("enzyme_ec").proteins
    assert one == Protein("P1", "MKV", ("1.1.1.-", "1.1.1.1"), "train") and one.top == (1,)
    assert two.top == (2, 3)
    table = "Entry,Sequence,EC number\nA,MKV,1.2.3.4\n"
    for name in ("30_protein_test.csv", "30-50_protein_test.csv"):
        (tmp_path / name).write_text(table)
    with pytest.warns(UserWarning, match="recorded"):
        assert [p.split for p in protein_source(f"care_task1:{tmp_path}").proteins] == ["30", "30-50"]


@pytest.mark.parametrize(("name", "told"), [
    ("uniprot", "did you mean 'uniprot20k'"),
    ("uniprot20k", "put it into $JAXMODELS_DATA/uniprot20k"),
    ("care_task1:nowhere", "splits/task1/30_protein_test.csv"),
    ("path:", "unknown source of proteins"),
    ("path:.", "is a folder"),
    ("path:nowhere.fasta", "no FASTA file"),
])
def test_what_is_missing_says_what_to_do(name, told, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXMODELS_DATA", str(tmp_path))
    with pytest.raises(UserError) as error:
        protein_source(name)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_damaged_tables_are_told(tmp_path):
    whole = gzip.compress(b"id\tec\tsplit\tsequence\nP1\t1.1.1.1\ttrain\tMKV\n" * 50)
    path = tmp_path / "enzyme_ec.tsv.gz"
    for content, told in ((whole[:-20], "damaged"), (b"id\tec\tsplit\nP\t1\ttrain\n", "no column 'sequence'"),
                          (b"id\tec\tsplit\tsequence\nP1\t1.1.1.1\n", "cut short"), (b"", "no column")):
        path.write_bytes(content)
        with pytest.warns(UserWarning), pytest.raises(UserError, match=told):
            protein_source(f"enzyme_ec:{path}")


def test_lists_of_sources_know_proteins(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXMODELS_DATA", str(tmp_path))
    assert is_source("enzyme_ec") and where("enzyme_ec") is None
    (tmp_path / "enzyme_ec").mkdir()
    assert where("enzyme_ec") == tmp_path / "enzyme_ec"


@pytest.mark.parametrize("longest", [1, 3, 10, 100])
def test_crops_are_the_whole_protein_in_nearly_equal_pieces(longest):
    for sequence in ("M", "MKV", RESIDUES, RESIDUES * 7 + "MK"):
        pieces = crops(sequence, longest)
        sizes = [len(piece) for piece in pieces]
        assert "".join(pieces) == sequence and max(sizes) <= longest and max(sizes) - min(sizes) <= 1


def test_families_join_near_copies_and_no_others():
    one, two, three = some_sequences(3, 150, 151)
    changed = "".join("W" if i % 40 == 20 else letter for i, letter in enumerate(one))
    number = families([one, two, changed, three, two[30:], "MKV", "MKV"])
    assert number[0] == number[2] and number[1] == number[4]
    assert len({number[i] for i in (0, 1, 3, 5, 6)}) == 5
    assert families([]).shape == (0,)


def test_what_is_held_out_shares_no_family_and_does_not_depend_on_order():
    sequences = some_sequences(200)
    proteins = [Protein(f"{i}{copy}", sequence + copy) for i, sequence in enumerate(sequences) for copy in ("A", "C")]
    train, validation = hold_out(proteins, 0.1)
    assert len(train) + len(validation) == 400 and 10 <= len(validation) <= 80
    assert not {p.sequence[:-1] for p in train} & {p.sequence[:-1] for p in validation}
    again = hold_out(proteins[::-1], 0.1)
    assert {p.name for p in again[1]} == {p.name for p in validation}
    assert len(hold_out(proteins[:4], 1e-9)[1]) == 2 and hold_out(proteins[:2])[1] == []


@pytest.mark.parametrize("length", [40, 64, 500])
def test_packing_keeps_proteins_whole(length):
    rows = [encode(sequence)[0] for sequence in some_sequences(150, 1, 39)]
    rows.insert(3, np.zeros(0, np.int32))
    packed = pack_whole(rows, length, PAD, seed=1)
    tokens, segments, documents = packed["tokens"], packed["segments"], packed["documents"]
    assert tokens.shape == segments.shape and tokens.shape[1] == length and len(documents) == len(tokens)
    seen = []
    for row, segment, numbers in zip(tokens, segments, documents, strict=True):
        real = segment > 0
        assert (row[~real] == PAD).all() and not real[real.sum():].any()
        for s in range(1, segment.max() + 1):
            assert (row[segment == s] == rows[numbers[s - 1]]).all()
            assert row[segment == s][0] == CLS and row[segment == s][-1] == EOS
        assert (numbers[segment.max():] == -1).all()
        seen += numbers[numbers >= 0].tolist()
    assert sorted(seen) == [i for i in range(len(rows)) if len(rows[i])]
    assert (segments == 0).sum() < length + 0.05 * segments.size  # one row that is not full
    again = pack_whole(rows, length, PAD, seed=1)
    assert all((packed[name] == again[name]).all() for name in packed)
    with pytest.raises(UserError, match="a row has 39; cut it first"):
        pack_whole([np.ones(41, int)], 39, PAD)


def test_buckets_hold_every_row_once_in_few_shapes():
    rows = [encode(sequence)[0] for sequence in some_sequences(300, 1, 1022)]
    batches = bucketed(rows, 2048)
    assert sorted(i for batch in batches for i in batch.index) == list(range(300))
    assert {batch.tokens.shape for batch in batches} <= {(2048 // length, length) for length in LENGTHS}
    for batch in batches:
        for i, row in zip(batch.index, batch.tokens, strict=False):
            assert (row[:len(rows[i])] == rows[i]).all() and (row[len(rows[i]):] == PAD).all()
            assert len(row) == min(length for length in LENGTHS if length >= len(rows[i]))
    assert bucketed([]) == []
    with pytest.raises(UserError, match="the longest bucket 1024"):
        bucketed([np.ones(1025, int)])


def test_the_real_sets(data_folder):
    if not (data_folder / "uniprot20k").exists():
        pytest.skip(f"no uniprot20k in {data_folder}")
    proteins, counts = protein_source("uniprot20k")
    assert counts["records"] == 20_426 and counts["odd_residues"] == 3169 + 2 + 2
    kept = distinct(proteins)
    assert len(kept) == 19_188
    train, validation = hold_out(kept)
    assert len(train) + len(validation) == 19_188 and 0.03 < len(validation) / 19_188 < 0.07
    enzymes, _ = protein_source("enzyme_ec")
    single = [p for p in enzymes if len(p.top) == 1]
    assert sum(p.split == "test" for p in single) == 1753
    # pre-training reads, without labels, all UniProt rows and one test chain (docs/proteins.md)
    known = {p.sequence for p in kept}
    overlap = {split: sum(p.sequence in known for p in enzymes if p.split == split)
               for split in ("train", "valid", "near_eval", "test")}
    assert overlap == {"train": 1293, "valid": 138, "near_eval": 874, "test": 1}
