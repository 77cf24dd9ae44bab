"""Embeddings of FASTA files: what is written, in which order, and what is told about the input."""

import json
import random

import numpy as np
import pytest

import jaxmodels
from jaxmodels import DecoderConfig, UserError, cli
from jaxmodels.esm.alphabet import encode
from jaxmodels.esm.embed import buckets, cut, embed, plan
from jaxmodels.esm.fasta import Record, clean
from tests.tiny_esm import random_esm, tiny
from tests.tiny_models import random_model

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture(scope="module")
def model():
    return random_esm(tiny(ffn_widths=(48,)))


@pytest.fixture(scope="module")
def records():
    """40 proteins of 3 to 60 residues, odd ones among them, in no order of length."""
    rng = random.Random(0)
    out = [Record(f"p{i}", "", "".join(rng.choices(LETTERS, k=rng.randint(3, 60)))) for i in range(36)]
    odd = [Record("gaps", "", "MK-V.."), Record("empty", "", "--*"), Record("p3", "again", "wwh"),
           Record("stop", "", "M*K1")]
    return out[:10] + odd + out[10:]


@pytest.fixture(scope="module")
def expected(model, records):
    """Hidden states of every protein, computed in one padded batch."""
    from jaxmodels.esm.alphabet import pad_batch

    rows = [encode(clean(r.sequence)[0])[0] for r in records]
    hidden = np.asarray(model(pad_batch(rows), output="hidden")[0])
    return [h[:len(row)] for h, row in zip(hidden, rows, strict=True)]


@pytest.mark.parametrize("pool", ["mean", pytest.param("cls", marks=pytest.mark.long), "none"])
def test_rows_in_the_order_of_the_file(tmp_path, model, records, expected, pool):
    seen = []
    report = embed(model, records, tmp_path / "e.npz", pool=pool, batch_tokens=128, about="m",
                   progress=lambda total: _Bar(total, seen))
    data = np.load(tmp_path / "e.npz")
    assert data["names"].tolist() == [r.name for r in records]
    assert data["lengths"].tolist() == [len(h) - 2 for h in expected]
    assert json.loads(str(data["about"]))["pool"] == pool
    got = data["embeddings"]
    assert got.dtype == np.float32 and sum(seen[1:]) == seen[0] == report.residues == data["lengths"].sum()
    if pool == "none":
        ends = data["offsets"]
        assert ends[-1] == len(got) == report.residues
        got = [got[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    for record, ours, hidden in zip(records, got, expected, strict=True):
        if pool == "none":
            assert np.allclose(ours, hidden[1:-1], atol=1e-5)
        elif record.name == "empty":
            assert np.isnan(ours).all()
        else:
            assert np.allclose(ours, hidden[1:-1].mean(0) if pool == "mean" else hidden[0], atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["e.npz"]
    told = "\n".join(report.lines())
    assert "40 proteins" in told and "1 entry without residues (NaN, length 0): empty" in told
    assert "1 name used by several entries, told apart by their order only: p3" in told
    assert "4 entries changed: 3 lower-case letters taken as upper case; 5 gaps" in told and "1 digits left out" in told


class _Bar:
    def __init__(self, total, seen):
        seen.append(total)
        self.seen = seen

    def __enter__(self):
        return self.seen.append

    def __exit__(self, *_):
        pass


def test_long_proteins_in_windows(tmp_path, model):
    """40,000 residues: windows overlap by half, each residue is taken once, from where its edges are far."""
    pieces = cut(7, 40_000, 1022)
    assert pieces[0].start == pieces[0].keep_from == 0 and pieces[-1].stop == pieces[-1].keep_to == 40_000
    assert all(a.keep_to == b.keep_from and b.start - a.start <= 511 for a, b in zip(pieces, pieces[1:], strict=False))
    assert all(p.stop - p.start == 1022 and p.protein == 7 for p in pieces)
    assert all(p.keep_from - p.start >= 255 for p in pieces[1:]) and all(p.stop - p.keep_to >= 255 for p in pieces[:-1])
    assert cut(0, 0, 5) == [] and len(cut(0, 5, 5)) == 1 and [p.keep_from for p in cut(0, 3, 1)] == [0, 1, 2]
    sequence = "".join(random.Random(1).choices(LETTERS, k=70))
    report = embed(model, [Record("long", "", sequence)], tmp_path / "e.npz", pool="none", max_length=30)
    assert "1 protein longer than 30 residues, done in overlapping windows" in "\n".join(report.lines())
    got = np.load(tmp_path / "e.npz")["embeddings"]
    for piece in cut(0, 70, 30):
        hidden = np.asarray(model(encode(sequence[piece.start:piece.stop])[0][None], output="hidden")[0])[0, 1:-1]
        kept = slice(piece.keep_from - piece.start, piece.keep_to - piece.start)
        assert np.allclose(got[piece.keep_from:piece.keep_to], hidden[kept], atol=1e-5)


def test_batches_have_few_shapes():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.8, 0.7, 5000).astype(int) + 3, 1022)  # like UniProt
    pieces = [piece for i, n in enumerate(lengths) for piece in cut(i, int(n), 1022)]
    batches = list(plan(pieces, 8192, 1024))
    assert sorted(p.protein for batch, _, _ in batches for p in batch) == list(range(5000))
    assert all(len(batch) <= rows and max(p.tokens for p in batch) <= length for batch, rows, length in batches)
    assert len({(rows, length) for _, rows, length in batches}) <= 11
    spent = sum(rows * length for _, rows, length in batches)
    assert spent < 1.35 * sum(p.tokens for p in pieces)
    assert len({(rows, length) for _, rows, length in plan(pieces[:40], 8192, 1024)}) <= 3
    assert list(plan([], 8192, 1024)) == [] and buckets(200) == [32, 48, 64, 96, 128, 192, 256]


def test_options_out_of_range(tmp_path, model):
    def refused(words, model=model, out=None, **options):
        with pytest.raises(UserError, match=words):
            embed(model, [Record("a", "", "MK")], out or tmp_path / "e.npz", **options)

    refused("pool 'max' is not one of mean, cls, none", pool="max")
    refused("batch tokens 0 must be at least 1", batch_tokens=0)
    refused("max length 0 must be at least 1", max_length=0)
    refused("it is a folder", out=tmp_path)
    refused("is not a writable folder", out=tmp_path / "no" / "e.npz")
    refused("max length 40 must be 1 to 36", random_esm(tiny(position="learned", max_positions=40)), max_length=40)
    refused("a vocabulary of 25 tokens", random_esm(tiny(vocab_size=25, mask_id=24)))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_nothing(tmp_path, model, records):
    class Stop:
        def __enter__(self):
            def stop(n):
                raise KeyboardInterrupt
            return stop

        def __exit__(self, *_):
            pass

    with pytest.raises(KeyboardInterrupt):
        embed(model, records, tmp_path / "e.npz", progress=lambda total: Stop())
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path, model, records, expected, capsys):
    jaxmodels.save(model, tmp_path / "model")
    (tmp_path / "p.fasta").write_text("".join(f">{r.name} {r.description}\n{r.sequence}\n" for r in records))
    out = tmp_path / "e.npz"
    arguments = ["embed", str(tmp_path / "p.fasta"), "--model", str(tmp_path / "model"), "--out", str(out)]
    assert cli.main(arguments) == 0
    written = capsys.readouterr()
    assert written.out.strip() == str(out) and "40 proteins" in written.err
    assert np.allclose(np.load(out)["embeddings"][0], expected[0][1:-1].mean(0), atol=1e-5)
    jaxmodels.save(random_model(DecoderConfig.tiny()), tmp_path / "decoder")
    for wrong, words in ((["--pool", "max"], "--pool 'max' is unknown"), (["--batch-tokens", "-1"], "at least 1"),
                         (["--model", str(tmp_path / "decoder")], "need an ESM encoder; this model is a Decoder")):
        assert cli.main([*arguments, *wrong]) == 2
        told = capsys.readouterr().err
        assert words in told and told.count("jaxmodels:") == 1
    (tmp_path / "p.fasta").write_text("MKV\n")
    assert cli.main(arguments) == 2 and "before any header" in capsys.readouterr().err


def test_commands_for_decoders_refuse_an_encoder(tmp_path, model, capsys):
    jaxmodels.save(model, tmp_path / "model")
    for command in (["split"], ["prune", "--keep", str(tmp_path / "keep.npy")]):
        np.save(tmp_path / "keep.npy", np.ones((1, 48), bool))
        assert cli.main([*command, str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 2
        assert "is an encoder; only decoders are split and pruned" in capsys.readouterr().err
