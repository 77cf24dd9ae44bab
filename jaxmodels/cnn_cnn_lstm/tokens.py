"""Raw text to sentences and words with exact places: ``text[word.start:word.stop] == word.text``, always.

Every character gets a class first (letter, digit, mark, space ...), the ASCII punctuation marks stay what they are, and
words are found among the classes: so combining marks, emoji sequences, flags and right-to-left text are handled by one
short pattern, and places in the classes are places in the text. Nothing is normalised.

Corpora differ in what they cut: `JOINS` of a tagger, read off the words it is trained on (`joins_of`), say at which
punctuation marks a word goes on ("Parkinson's", "0.5", "beta-blocker").
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

LETTER, DIGIT, MARK, SPACE, SYMBOL, JOINER, FLAG, TONE = "anm sjrk"
_LIKE = {"\u2019": "'", "\u2018": "'", "\u02bc": "'", "\u2010": "-", "\u2011": "-", "\u2013": "-", "\u2212": "-"}
MARKS = "-.',/&_:@#+*"  # that may be within a word
PLAIN = ("a.a",)  # joins of text that nothing is known about: U.S, e.g
STOPS = ".!?\u2026\u3002\uff01\uff1f\u061f\u06d4\u0964"
WIDE_STOPS = "\u3002\uff01\uff1f"  # no space follows them
_CLOSING = "\"')]}\u2019\u201d\u00bb"
# Abbreviations after which a sentence goes on although a capital may follow.
_SHORT = frozenset((
    "dr", "mr", "mrs", "ms", "prof", "st", "no", "vs", "fig", "figs", "eq", "eqs", "ref", "refs", "approx",
    "ca", "cf", "et", "al", "e.g", "i.e", "resp", "sp", "spp", "var", "subsp", "inc", "ltd", "co", "corp", "jr",
    "sr", "vol", "pp",
))


class Word(NamedTuple):
    """A word and its place in the text."""

    text: str
    start: int
    stop: int


class _Classes(dict):
    """Code point -> class, looked up once a character."""

    def __missing__(self, code: int) -> str:
        self[code] = found = _class(chr(code))
        return found


def _class(c: str) -> str:
    kind = unicodedata.category(c)
    if c in _LIKE:
        return _LIKE[c]
    if c in "\u200c\u00ad" or kind[0] == "M":  # non-joiner and soft hyphen belong to the word around them
        return MARK
    if c == "\u200d":
        return JOINER
    if "\U0001f1e6" <= c <= "\U0001f1ff":
        return FLAG
    if "\U0001f3fb" <= c <= "\U0001f3ff":
        return TONE
    if kind[0] == "L":
        return LETTER
    if kind[0] == "N":
        return DIGIT
    if c.isspace() or kind[0] in "CZ":  # with the signs of writing direction, which are no part of a word
        return SPACE
    return c if c.isascii() else SYMBOL


_CLASSES = _Classes()


def joins_of(sentences: Iterable[Sequence[str]], share: float = 0.5) -> tuple[str, ...]:
    """Where words of a corpus go on: ``a-a`` if a hyphen between letters is more often within a word than a word.

    A join is class, mark, class; ``@a`` for marks that words begin with (@name, #topic, 's), ``..`` for repeated ones,
    ``://`` for addresses. share: of those within among all, from which on they join.
    """
    within: Counter[str] = Counter()
    apart: Counter[str] = Counter()
    for words in sentences:
        classes = [word.translate(_CLASSES) for word in words]
        for place, text in enumerate(classes):
            before = classes[place - 1][-1] if place else SPACE
            if "://" in text:
                within["://"] += 1
                continue
            if text[0] in MARKS and text in (text[0], 2 * text[0], 3 * text[0]):
                (within if len(text) > 1 else apart)[2 * text[0]] += len(text) > 1 or before == text
            for i, c in enumerate(text[:-1]):
                if c in MARKS and _is_inner(text[i + 1]):
                    if i == 0:
                        within[c + text[1]] += 1
                        apart[before + c + text[1]] += _is_inner(before)
                    elif _is_inner(text[i - 1]):
                        within[text[i - 1] + c + text[i + 1]] += 1
            if len(text) == 1 and text in MARKS and place + 1 < len(classes) and _is_inner(classes[place + 1][0]):
                apart[text + classes[place + 1][0]] += 1
                apart[before + text + classes[place + 1][0]] += _is_inner(before)
    return tuple(sorted(join for join, n in within.items() if n >= share * (n + apart[join])))


def _is_inner(c: str) -> bool:
    return c in (LETTER, DIGIT)


def pattern_of(joins: Sequence[str] = PLAIN) -> re.Pattern[str]:
    """Of words, among classes."""
    inner, attached = f"[{LETTER}{DIGIT}]", f"{MARK}*"
    inside = [join for join in joins if len(join) == 3 and join != "://"]
    middle = [f"(?<=[{left}{MARK}]){re.escape(mark)}(?={right})" for left, mark, right in inside]
    heads = [f"{re.escape(join[0])}(?={join[1]})" for join in joins if len(join) == 2 and join[0] != join[1]]
    runs = [f"{re.escape(join[0])}{{2,}}" for join in joins if len(join) == 2 and join[0] == join[1]]
    address = [f"{LETTER}+://[^{SPACE}]+"] if "://" in joins else []
    glue = f"(?:{'|'.join(middle)})?" if middle else ""
    word = f"(?:{'|'.join(heads)})?" if heads else ""
    word += f"{inner}{attached}(?:{JOINER}?{glue}{inner}{attached})*"
    emoji = f"{SYMBOL}[{MARK}{TONE}]*(?:{JOINER}{SYMBOL}[{MARK}{TONE}]*)*"
    flag = f"{FLAG}{FLAG}?"
    return re.compile("|".join([*address, word, *runs, emoji, flag, f"[^{SPACE}]{attached}"]))


def words_of(text: str, pattern: re.Pattern[str], start: int = 0) -> list[Word]:
    """The words of a text, places counted from `start`."""
    return [Word(text[m.start():m.end()], start + m.start(), start + m.end())
            for m in pattern.finditer(text.translate(_CLASSES))]


def sentences_of(text: str, pattern: re.Pattern[str]) -> list[list[Word]]:
    """The words of every sentence of a text. A line's end ends a sentence; so does a stop, with what closes behind it,
    before a space and what may begin one, but for the full stop of abbreviations and initials."""
    found, at = [], 0
    for line in re.split("(\r\n|[\n\r\u2028\u2029])", text):
        words = words_of(line, pattern, at)
        at += len(line)
        begin = 0
        for i in range(len(words) - 1):
            if _ends(text, words, i):
                found.append(words[begin:i + 1])
                begin = i + 1
        if begin < len(words):
            found.append(words[begin:])
    return found


def _ends(text: str, words: Sequence[Word], i: int) -> bool:
    """Whether a sentence ends behind word i."""
    word, after = words[i], words[i + 1]
    k = i  # the stop itself, behind which quotes and brackets may close
    while k >= 0 and words[k].text in _CLOSING and i - k < 3:
        k -= 1
    if k < 0 or words[k].text[-1] not in STOPS:
        return False
    if words[k].text in WIDE_STOPS:
        return after.text not in _CLOSING + STOPS
    if word.stop == after.start or after.text[0].islower() or after.text in ",;:":
        return False
    if words[k].text != "." or k == 0:
        return True
    before = words[k - 1]
    if before.stop != words[k].start:
        return True
    return not (before.text.lower() in _SHORT or (len(before.text) == 1 and before.text.isalpha()))
