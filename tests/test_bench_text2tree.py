"""The benchmark of Text2Tree at a toy size: its sides do the same work, and rows say what they must."""

import json

import numpy as np
import pytest

from benchmarks import text2tree
from benchmarks._timing import Samples
from tests.tiny_texts import bert_folder

TINY = {"frozen": 1, "batch": 4, "length": 16, "short": 16, "repeats": (1, 1) * 3}


@pytest.mark.parametrize(("codes", "levels", "largest"), [
    (text2tree.MESH, [1, 10, 56, 100], 2), (text2tree.ICD, [1, 22, 285, 1918], 27)])
def test_trees_are_as_large_as_those_of_the_tasks(codes, levels, largest):
    tree = codes.tree()
    assert np.bincount(tree.depth).tolist() == levels and (tree.depth[tree.leaf_index] == 3).all()
    assert abs(np.bincount(tree.parent[tree.leaf_index]).max() - largest) <= 0.15 * largest  # of the task's own
    assert tree.num_classes == codes.classes and codes.of(6).shape == ((6, 100) if codes.a_text else (6,))


def test_rows():
    plain, full = Samples([1.0, 2.0, 3.0], [0.0] * 3), Samples([2.0, 2.6, 3.0], [0.0] * 3)
    first, second = text2tree.compare("training, whole encoder", {"plain": plain, "text2tree": full}, 64, nodes=167)
    assert (first["texts/s"], first["ms"], first["x plain"]) == (32, 2000, 1) and "result" not in first
    assert second["x plain"] == 1.3 and (second["bar"], second["result"], second["nodes"]) == (1.25, "missed", 167)
    assert second["p10"] < second["ms"] < second["p90"]
    (_, met) = text2tree.compare("training, whole encoder", {"plain": full, "text2tree": plain}, 64)
    assert met["result"] == "met"
    # 1.3 times as long, and within the noise; beyond it: another time
    (_, equal) = text2tree.compare("inference, whole encoder", {"plain": plain, "text2tree": full}, 64)
    slow = Samples([4.0, 5.0, 6.0], [0.0] * 3)
    (_, other) = text2tree.compare("inference, whole encoder", {"plain": plain, "text2tree": slow}, 64)
    assert (equal["result"], other["result"]) == ("met", "missed")


def test_other_work_is_an_error():
    logits, labels = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    loss = float(np.log1p(np.exp(-1)))
    text2tree.check_same_work({"plain": lambda: logits, "near": lambda: logits + 1e-5}, labels, loss)
    with pytest.raises(RuntimeError, match="the answers of other are not ours"):
        text2tree.check_same_work({"plain": lambda: logits, "other": lambda: logits + 1e-2}, labels, None)
    with pytest.raises(RuntimeError, match="PyTorch's loss is 0.40000, ours 0.31326"):
        text2tree.check_same_work({"plain": lambda: logits}, labels, 0.4)


def whole_command(tmp_path, capsys):
    text2tree.main(str(tmp_path / "out.json"), encoder=str(bert_folder(tmp_path / "bert")), **TINY)
    told = capsys.readouterr().out
    assert all(column in told for column in text2tree.COLUMNS)
    return json.loads((tmp_path / "out.json").read_text())["rows"], told


@pytest.mark.long
@pytest.mark.soak
def test_without_torch(tmp_path, monkeypatch, capsys):
    """Both methods with and without frozen layers; inference is one program; PyTorch's row tells why it is empty."""
    monkeypatch.setattr(text2tree, "PEERS", ("no_such_peer",))
    rows, told = whole_command(tmp_path, capsys)
    *measured, absent = rows
    assert [(row["what"], row["side"]) for row in measured] == [
        (f"{what}, {part}", side) for part in ("1 layers frozen", "whole encoder", "phrases, 1 layers frozen")
        for what in ("training", "inference") for side in ("plain", "text2tree")]
    assert all(row["same_program"] for row in measured if row["what"].startswith("inference"))
    assert all(row["texts/s"] == pytest.approx(4e3 / row["ms"]) and row["length"] == 16 for row in measured)
    assert absent["result"] == "torch is not installed" and "the same program" in told


@pytest.mark.long
@pytest.mark.torch
def test_beside_torch(tmp_path, capsys):
    """PyTorch's logits and loss are ours (the command checks them), and it trains."""
    rows, _ = whole_command(tmp_path, capsys)
    theirs = [row for row in rows if row["side"] == "PyTorch, plain"]
    assert [row["what"] for row in theirs] == ["training, whole encoder", "inference, whole encoder"]
    assert all(row["texts/s"] > 0 and row["x plain"] > 0 and "result" not in row for row in theirs)
