"""FASTA files as people have them, and what becomes of characters that are no residues."""

import gzip

import pytest

from jaxmodels import UserError
from jaxmodels.esm.fasta import COUNTED, Record, clean, read_fasta

TEXT = ">sp|P1|A_HUMAN first protein\nMKVL\nAAGG\n\n>b\nWW\n>empty\n>\nCC\n"
RECORDS = [Record("sp|P1|A_HUMAN", "first protein", "MKVLAAGG"), Record("b", "", "WW"), Record("empty", "", ""),
           Record("", "", "CC")]


@pytest.mark.parametrize("content", [
    TEXT.encode(), TEXT.replace("\n", "\r\n").encode(), TEXT.replace("\n", "\r").encode(),
    b"\xef\xbb\xbf;comment\n" + TEXT.encode(), TEXT.rstrip("\n").encode(), gzip.compress(TEXT.encode()),
    gzip.compress(TEXT[:20].encode()) + gzip.compress(TEXT[20:].encode()),  # bgzip writes several members
    TEXT.replace("MKVL\n", "  MKVL \t\n").encode(), TEXT.replace(" first", "\tfirst").encode(),
], ids=["unix", "windows", "mac", "bom and comment", "no end", "gzip", "members", "blanks", "tab"])
def test_every_way_of_writing_gives_the_same_records(tmp_path, content):
    (tmp_path / "a.fasta").write_bytes(content)
    assert read_fasta(tmp_path / "a.fasta") == RECORDS
    assert read_fasta(str(tmp_path / "a.fasta")) == RECORDS


def test_names_of_any_encoding(tmp_path):
    (tmp_path / "a.fa").write_bytes(b">caf\xe9 x\nMK\n>\xc3\xa9\nAC\n")
    assert [(r.name, r.sequence) for r in read_fasta(tmp_path / "a.fa")] == [("caf\ufffd", "MK"), ("é", "AC")]


def test_files_that_are_none(tmp_path):
    def refused(path, words):
        with pytest.raises(UserError, match=words) as caught:
            read_fasta(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none.fa", "no FASTA file at")
    refused(tmp_path, "cannot read .*directory")
    for content, words in ((b"", "holds no FASTA entry"), (b"\n\n;x\n", "holds no FASTA entry"),
                           (b"MKVL\n>a\nMK\n", "line 1 is 'MKVL', before any header"),
                           (gzip.compress(TEXT.encode() * 50)[:60], "damaged gzip"), (b"\x1f\x8bnonsense", "damaged")):
        (tmp_path / "a.fa").write_bytes(content)
        refused(tmp_path / "a.fa", words)


@pytest.mark.parametrize("sequence, expected, counts", [
    ("ACDEFGHIKLMNPQRSTVWYXBUZO", "ACDEFGHIKLMNPQRSTVWYXBUZO", {}),
    ("", "", {}),
    ("mkV", "MKV", {"lower_case": 2}),
    ("M-K..V", "MKV", {"gaps": 3}),
    ("MKV*", "MKV", {"stops": 1}),
    ("M*KV*", "MXKV", {"stops": 2}),
    ("MKV* 120", "MKV", {"stops": 1, "digits": 3, "blanks": 1}),
    ("MKJ", "MKX", {"unknown": 1}),
    ("1 MKV 10", "MKV", {"digits": 3, "blanks": 2}),
    ("ßé😀A", "XXXA", {"unknown": 3}),  # ß must not become two residues
    ("***", "", {"stops": 3}),
    ("--", "", {"gaps": 2}),
])
def test_clean(sequence, expected, counts):
    assert clean(sequence) == (expected, counts)
    assert set(counts) <= set(COUNTED) and clean(expected) == (expected, {})
