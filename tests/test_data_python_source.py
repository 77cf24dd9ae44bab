"""Documents of the standard library and of folders; the tokenizer that is trained on them."""

import ast
import re
import sysconfig
import warnings
from pathlib import Path

import numpy as np
import pytest

from jaxmodels.errors import UserError
from train.data import bpe
from train.data.python_source import documents, held_out

WHITESPACE = "\tif x:\r\n\t\treturn  1   # é 𝛼 \u200b\ufeff\x00\x7f <|endoftext|> <|endoftext|>\n\n\n    \n"


@pytest.fixture(scope="module")
def library():
    return documents("python", "train"), documents("python", "validation")


@pytest.fixture(scope="module")
def tokenizer(library):
    return bpe.train((one.text for one in library[0][::10]), 600)


def test_the_library_splits_by_package(library):
    train, validation = library
    packages = [{one.package for one in part} for part in library]
    assert not packages[0] & packages[1] and len(packages[1]) >= 10
    sizes = [sum(len(one.text.encode()) for one in part) for part in library]
    assert sum(sizes) > 7e6 and 0.05 < sizes[1] / sum(sizes) < 0.08
    assert {"json", "pathlib", "re"} <= packages[1] and {"asyncio", "argparse", "typing"} <= packages[0]
    for part in library:
        names = [one.name for one in part]
        assert names == sorted(set(names))
        assert not [name for name in names if re.search(r"(^|/)(tests?|idlelib|site-packages|__pycache__)(/|\.)", name)]
    json = next(one for one in validation if one.name == "json/decoder.py")
    assert json.package == "json" and json.text.encode() == Path(sysconfig.get_path("stdlib"), json.name).read_bytes()
    for one in train[::20]:
        ast.parse(one.text)
    assert documents("python", "validation") == validation


def test_another_package_moves_no_other():
    names = {f"package{number}" for number in range(400)}
    held = held_out(names)
    assert 10 < len(held) < 40
    assert held_out(names | {"new"}) - {"new"} == held
    assert held_out({"one"}) == set() and held_out(set()) == set()
    for number in range(50):  # two packages: always one of each split
        assert len(held_out({f"a{number}", f"b{number}"})) == 1


def test_a_folder_of_texts(tmp_path):
    for name, data in {
        "a/one.py": b"x = 1\n",
        "a/deep/two.md": "\ufeffzwei é".encode(),
        "b.txt": b"three",
        "empty.py": b" \n",
        ".git/hidden.py": b"no",
        "c/picture.png": b"no",
        "c/bad.txt": b"caf\xe9",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with pytest.warns(UserWarning, match=r"1 files are not UTF-8 and are left out: c/bad.txt"):
        found = documents(f"path:{tmp_path}", "train")
    with pytest.warns(UserWarning, match="c/bad.txt"):
        found += documents(f"path:{tmp_path}", "validation")
    assert sorted((one.name, one.package, one.text) for one in found) == [
        ("a/deep/two.md", "a", "zwei é"),
        ("a/one.py", "a", "x = 1\n"),
        ("b.txt", "b", "three"),
    ]


@pytest.mark.parametrize(
    ("source", "split", "told"),
    [
        ("pyton", "train", "did you mean 'python'"),
        ("python:3", "train", "unknown source of documents 'python:3'"),
        ("path:", "train", "unknown source of documents 'path:'"),
        ("path:/no/where", "train", "/no/where is not a folder"),
        ("python", "test", "unknown split 'test'; known: train, validation"),
        ("path:{}/empty", "train", "no text in"),
        ("path:{}/single", "validation", "nothing to hold out of one package (only)"),
    ],
)
def test_what_is_not_there_is_told_in_a_line(source, split, told, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "single/only").mkdir(parents=True)
    (tmp_path / "single/only/text.txt").write_text("text")
    with pytest.raises(UserError) as error:
        documents(source.format(tmp_path), split)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_every_text_comes_back_exactly(library, tokenizer):
    texts = [one.text for one in library[1]] + [WHITESPACE, "", "".join(map(chr, range(0xD800)))]
    size = bpe.token_bytes(tokenizer)
    assert size.shape == (600,) and size[bpe.EOS] == 0 and size[1:].min() == 1
    for text, ids in zip(texts, bpe.encode(tokenizer, texts), strict=True):
        assert tokenizer.decode(ids.tolist()) == tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
        assert bpe.EOS not in ids and ids.dtype == np.int32
        assert size[ids].sum() == len(text.encode())


def test_the_tokenizer_is_deterministic_and_survives_the_disk(library, tokenizer, tmp_path):
    again = bpe.train([one.text for one in library[0][::10]], 600)
    assert again.to_str() == tokenizer.to_str() and again.token_to_id("<|endoftext|>") == 0
    path = bpe.save(tokenizer, tmp_path / "tokenizer.json")
    loaded = bpe.load(path)
    assert loaded.to_str() == tokenizer.to_str()
    np.testing.assert_array_equal(bpe.encode(loaded, [WHITESPACE])[0], bpe.encode(tokenizer, [WHITESPACE])[0])
    with pytest.raises(UserError, match="vocab_size 256 is below 257"):
        bpe.train(["x"], 256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = path.read_bytes()
        other = whole.replace(b"endoftext", b"end_of_tx")
        for damaged in (b"", whole[:-100], b"{}", b"\xff", other):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match="tokenizer.json is not"):
                bpe.load(path)
        path.unlink()
        with pytest.raises(UserError, match="tokenizer.json is not"):
            bpe.load(path)
