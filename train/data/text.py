"""What every text source yields, and decoding that counts what it had to replace."""

import dataclasses
from collections.abc import Iterable

from train.data.languages import LANGUAGES, lookup, script_of, split_code


@dataclasses.dataclass(frozen=True)
class LanguageText:
    """Text units of one language (messages, sentences, paragraphs), in the order of the source."""

    code: str  # BCP 47: de, pt-BR, zh-Hant
    name: str
    texts: list[str] = dataclasses.field(repr=False)
    family: str  # "" where train.data.languages does not know
    script: str  # ISO 15924
    source: str
    license: str
    variant_of: str | None = None  # code of the language that this one counts as in tests about families
    replaced: int = 0  # invalid UTF-8 sequences that became U+FFFD

    @property
    def characters(self) -> int:
        """Length of all texts together."""
        return sum(map(len, self.texts))


def language_text(
    code: str, texts: Iterable[str], source: str, license: str, replaced: int = 0, name: str = ""
) -> LanguageText:
    """A LanguageText with name, family and script filled in; `variant_of` is set later, when all codes are known.

    `name` is used for a language that the table does not hold.

    The script is the one that the text is written in: tags lie (a "ckb-Latn" in Arabic letters), letters do not. Only
    simplified and traditional Chinese, which share their characters' names, are told by the tag.
    """
    texts, language = list(texts), lookup(code)
    seen = script_of(texts)
    script = language.script if seen in ("", "Hani") and language.script else seen
    name = language.name if language.family or not name else name
    return LanguageText(language.code, name, texts, language.family, script, source, license, None, replaced)


def mark_variants(languages: Iterable[LanguageText]) -> list[LanguageText]:
    """Sorted by code, codes made unique, and every text of a language beyond its main one marked with `variant_of`.

    The main text of a language is the one without subtags, else one in its usual script, else the first given.
    """
    groups: dict[str, list[LanguageText]] = {}
    for language in languages:
        groups.setdefault(split_code(language.code)[0], []).append(language)
    marked = []
    for base, group in groups.items():
        usual = lookup(base).script
        main, *variants = sorted(group, key=lambda one: (one.code != base, one.script != usual))  # stable
        marked.append(main)
        codes = {main.code}
        for variant in variants:
            code, count = variant.code, 2
            while code in codes:
                code, count = f"{variant.code}-x-{count}", count + 1
            codes.add(code)
            marked.append(dataclasses.replace(variant, code=code, variant_of=main.code))
    return sorted(marked, key=lambda one: one.code)


def decode(data: bytes) -> tuple[str, int]:
    """Text and the number of invalid UTF-8 sequences replaced by U+FFFD; a byte order mark is dropped."""
    text = data.decode("utf-8-sig", errors="replace")
    if "\ufffd" not in text:
        return text, 0
    return text, text.count("\ufffd") - data.count("\ufffd".encode())  # those that the file itself holds are not ours


def known_language(word: str) -> str | None:
    """The code if `word` is one the table knows, else None."""
    return word if split_code(word)[0] in LANGUAGES else None

