"""Text from gettext catalogues: the interface messages of a program in every language it speaks.

The default is the Django wheel, read as data (Django is never imported): about a hundred locales, on every machine that
has the package index. English, which needs no translation, is the message ids. Format of .mo files: GNU gettext manual,
section "The Format of GNU MO Files"; fuzzy (unchecked) translations are not in them.
"""

import html
import re
import struct
from pathlib import Path

from jaxmodels.errors import UserError
from train.data.languages import split_code
from train.data.text import LanguageText, decode, language_text, mark_variants

LICENSE = "BSD-3-Clause (Django and its translators)"

_MARKUP = re.compile(r"</?[^\W\d_][^<>]*>")
_FIELDS = re.compile(
    r"%\(\w*\)[-#0+.\d]*[a-zA-Z]?"  # %(name)s, and translators' slips such as %(name).s
    r"|%[sd]"  # also before an ending that the translator glued on: %sn
    r"|%[-#0+]*\d*(?:\.\d+)?[ifrgx](?![a-zA-Z])"
    r"|\{\{.*?\}\}|\{%.*?%\}|\{[\w.!:]*\}"  # {{ template }}, {name}
    r"|https?://\S+"
)
_EMPTY_PAIRS = re.compile(r"""["'“„”«»‘’‚]\s*["'“”«»‘’]|\(\s*\)|\[\s*\]""")
_LETTER = re.compile(r"[^\W\d_]")


def read_gettext(folder: Path, source: str, license: str) -> list[LanguageText]:
    """One LanguageText a locale of the ``**/locale/<code>/LC_MESSAGES/*.mo`` under `folder`.

    Messages are cleaned (see `clean`), each kept once a language; a translation equal to its English id was not
    translated and is dropped, except in English's own variants. Order: catalogue, then message id, equal in all.
    Raises UserError if there are no catalogues, or one is damaged.
    """
    paths = sorted(folder.rglob("locale/*/LC_MESSAGES/*.mo"))
    if not paths:
        raise UserError(f"no gettext catalogues in {folder}: expected .../locale/<code>/LC_MESSAGES/*.mo (run msgfmt)")
    texts: dict[str, dict[str, None]] = {}  # dicts: sets that keep their order
    english: dict[tuple[str, str], None] = {}
    replaced: dict[str, int] = {}
    for path in paths:
        code = path.parts[-3].replace("_", "-")
        is_english = split_code(code)[0] == "en"
        catalogue, bad = read_mo(path)
        replaced[code] = replaced.get(code, 0) + bad
        kept = texts.setdefault(code, {})
        for ids, translations in catalogue:
            english |= {(str(path.relative_to(folder).parts[:-4]), text): None for text in ids}
            kept |= {clean(text): None for text in translations if is_english or text not in ids}
    texts["en"] = {clean(text): None for _, text in sorted(english)}
    languages = [
        language_text(code, [text for text in kept if text], source, license, replaced.get(code, 0))
        for code, kept in texts.items()
    ]
    return mark_variants(language for language in languages if language.texts)


def read_mo(path: Path) -> tuple[list[tuple[list[str], list[str]]], int]:
    """``(ids, translations)`` of every message (two ids where there is a plural), and the invalid UTF-8 replaced.

    The header (empty id) and message contexts are left out. Raises UserError for a file that is not a whole catalogue.
    """
    data, messages, replaced = path.read_bytes(), [], 0
    try:
        order = {0x950412DE: "<", 0xDE120495: ">"}[struct.unpack_from("<I", data)[0]]
        count, ids_at, texts_at = struct.unpack_from(f"{order}8x3I", data)
        for index in range(count):
            parts = []
            for table in (ids_at, texts_at):
                length, start = struct.unpack_from(f"{order}2I", data, table + 8 * index)
                if start + length > len(data):
                    raise struct.error("a message lies beyond the end")
                parts.append(data[start : start + length])
            (ids, bad_ids), (texts, bad_texts) = map(decode, parts)
            replaced += bad_ids + bad_texts
            if ids:
                messages.append((ids.rpartition("\x04")[2].split("\0"), texts.split("\0")))
    except (struct.error, KeyError) as error:
        raise UserError(f"{path} is not a whole gettext catalogue ({error}); install the package again") from error
    return messages, replaced


def clean(message: str) -> str:
    """The words of a message: no placeholders, markup, entities or quotes left empty; "" if no two letters remain."""
    text = html.unescape(_FIELDS.sub(" ", _MARKUP.sub(" ", message)).replace("%%", "%"))
    text = " ".join(_EMPTY_PAIRS.sub(" ", text).split())
    text = re.sub(r" ([.,;:!?])", r"\1", text).strip(" :;,.-–—…" if len(text) < 4 else " ")
    return text if len(_LETTER.findall(text)) >= 2 else ""
