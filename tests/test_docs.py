"""The documents: their Python runs, prints what they say, their commands exist, their links lead somewhere."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from jaxmodels import cli
from jaxmodels.errors import UserError
from jaxmodels.hub import resolve
from tests import check_model

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "jaxmodels").rglob("README.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
WEIGHTS = "smollm2-135m-instruct"
NUMBER = re.compile(r"-?\d+\.\d+")


def blocks(path, *kinds):
    """(kind, text) of the fenced blocks of a document, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [(kind, text) for kind, text in found if kind in kinds]


def commands():
    """Every `jaxmodels …` line of the documents' sh blocks."""
    return [line for path in DOCUMENTS for _, text in blocks(path, "sh")
            for line in text.replace("\\\n", " ").splitlines() if line.strip().startswith("jaxmodels ")]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] if name == "README.md" else [])
                                  for name, path in zip(NAMES, DOCUMENTS, strict=True) if blocks(path, "python")])
def test_python_blocks(name, tmp_path, monkeypatch):
    """They run in order in one namespace; a text block after one is what it prints, decimals to 0.02."""
    found = blocks(ROOT / name, "python", "text")
    if any(f'load("{WEIGHTS}")' in text.split("#")[0] for _, text in found):
        try:
            resolve(WEIGHTS)
        except UserError as error:
            pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    namespace, printed = {"__name__": "document"}, ""
    for kind, text in found:
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, name, "exec"), namespace)
            printed = out.getvalue()
        else:
            assert NUMBER.sub("#", printed) == NUMBER.sub("#", text)
            np.testing.assert_allclose([float(n) for n in NUMBER.findall(printed)],
                                       [float(n) for n in NUMBER.findall(text)], atol=0.02)


@pytest.mark.parametrize("line", commands())
def test_commands_exist(line):
    """Their options parse, experiments are there and overrides are keys of theirs."""
    words = shlex.split(line, comments=True)[1:]
    words = words[:words.index("|")] if "|" in words else words
    arguments = cli.parser_of(words[0]).parse_intermixed_args(words[1:])
    if words[0] == "run":
        from train.runtime.config import resolve as resolve_config

        resolve_config(arguments.name, arguments.overrides)


def test_there_are_commands_of_every_kind():
    assert {line.split()[1] for line in commands()} == set(cli.COMMANDS)


@pytest.mark.parametrize("name", NAMES)
def test_links_and_paths_lead_somewhere(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert ((ROOT / name).parent / target).exists(), target
    for target in re.findall(r"`((?:jaxmodels|train|analysis|configs|tests|docs|benchmarks)/[\w/.]+\.\w+)`", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("model", check_model.models())
def test_model_folders_are_complete(model):
    assert check_model.lacks(model) == []


def test_the_check_sees_what_is_missing(monkeypatch, tmp_path):
    assert check_model.main(["decoder"]) == 0
    folder = tmp_path / "jaxmodels" / "decoder"
    folder.mkdir(parents=True)
    monkeypatch.setattr(check_model, "ROOT", tmp_path)
    (folder / "model.py").write_text("from jax.sharding import Mesh\n" + "\n" * 700)
    assert sum("does not exist" in problem for problem in check_model.lacks("decoder")) == 2
    (folder / "convert.py").write_text("")
    (folder / "README.md").write_text("| loads | parity |\n")
    told = "\n".join(check_model.lacks("decoder"))
    for words in ("701 lines", "names Mesh", "no column 'trains'", "does not mention 'llama'", "cites no paper",
                  "names no experiment", "no files of 'qwen2'", "test_decoder_golden.py does not exist"):
        assert words in told, words
    assert check_model.main(["decoder"]) == 1
