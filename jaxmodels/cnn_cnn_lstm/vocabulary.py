"""Words, characters and tags as numbers, and sentences as rows of them."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.cnn_cnn_lstm.network import END, PAD, START, UNK
from jaxmodels.errors import UserError

SPECIAL = END + 1  # rows that stand for no word, no character
CHARS = 20  # of a word that are read: 99.8 % of the words of four corpora are no longer
LONGEST = 1000  # that may be asked for: a batch has this width for every word


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """words: lower-cased; case lives in the characters. types: of entities; tags are IOBES, O first."""

    words: tuple[str, ...]
    chars: tuple[str, ...]
    types: tuple[str, ...]
    length: int = CHARS

    def __post_init__(self):
        for name in ("words", "chars", "types"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                twice = next(value for value, n in Counter(values).items() if n > 1)
                raise UserError(f"the vocabulary has {twice!r} twice among its {name}; leave one out")
        if self.length < 4:
            raise UserError(f"{self.length} characters of a word leave nothing to read; take 4 or more")
        if self.length > LONGEST:
            raise UserError(f"{self.length} characters of a word are over the limit of {LONGEST}; take fewer")

    @classmethod
    def build(cls, sentences: Iterable[Sequence[str]], types: Iterable[str], *, more_words: Iterable[str] = (),
              floor: int = 1, length: int = CHARS) -> "Vocabulary":
        """From the words of sentences (text is known even where labels are not) and those that vectors are there for.

        floor: times that a word has to occur.
        """
        counts = Counter(word for words in sentences for word in words)
        lower: Counter[str] = Counter()
        for word, n in counts.items():
            lower[word.lower()] += n
        known = {word for word, n in lower.items() if n >= floor}
        return cls(tuple(sorted(known | {word.lower() for word in more_words})),
                   tuple(sorted({c for word in counts for c in word})), tuple(sorted(set(types))), length)

    @functools.cached_property
    def tags(self) -> tuple[str, ...]:
        return ("O", *(f"{letter}-{kind}" for kind in self.types for letter in "BIES"))

    @functools.cached_property
    def tag_ids(self) -> dict[str, int]:
        return {tag: i for i, tag in enumerate(self.tags)}

    @functools.cached_property
    def _word_ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words, SPECIAL)}

    @functools.cached_property
    def _char_ids(self) -> dict[str, int]:
        return {c: i for i, c in enumerate(self.chars, SPECIAL)}

    @property
    def sizes(self) -> dict[str, int]:
        """As the model's config takes them."""
        return {"words": len(self.words) + SPECIAL, "chars": len(self.chars) + SPECIAL, "tags": len(self.tags)}

    def word_ids(self, words: Sequence[str]) -> list[int]:
        ids = self._word_ids
        return [ids.get(word.lower(), UNK) for word in words]

    def char_ids(self, word: str) -> np.ndarray:
        """int32[length]: START, the characters, END, padding. Of a longer word the middle is left out: names of
        chemicals and diseases are told by how they end."""
        room = self.length - 2
        if len(word) > room:
            word = word[:room - room // 2] + word[len(word) - room // 2:]
        ids = np.full(self.length, PAD, np.int32)
        ids[:len(word) + 2] = [START, *(self._char_ids.get(c, UNK) for c in word), END]
        return ids

    def char_table(self, words: Collection[str]) -> np.ndarray:
        """Characters of words, int32[n + 1, length]; the last row is of what is no word."""
        return np.stack([*map(self.char_ids, words), np.full(self.length, PAD, np.int32)])

    def encode_tags(self, tags: Sequence[str]) -> list[int]:
        """IOBES tags. Raises UserError for a type that the vocabulary does not have."""
        try:
            return [self.tag_ids[tag] for tag in tags]
        except KeyError as error:
            raise UserError(f"tag {error.args[0]} is not one of this tagger's; its types are {', '.join(self.types)}"
                            ) from None

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, about: Mapping[str, Any]) -> "Vocabulary":
        """Raises UserError for what `to_json` has not written."""
        try:
            lists = {name: tuple(about[name]) for name in ("words", "chars", "types")}
            if not all(isinstance(item, str) for values in lists.values() for item in values):
                raise TypeError
            if type(about["length"]) is not int:
                raise TypeError
            return cls(**lists, length=about["length"])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError("the vocabulary is damaged: it needs lists of words, chars and types and a length; save "
                            "the tagger again") from None


def pieces(length: int, longest: int) -> list[tuple[int, int]]:
    """A sentence of so many words in parts of at most `longest`, nearly equal ones: [(start, stop)]."""
    count = max(-(-length // longest), 1)
    ends = [length * i // count for i in range(count + 1)]
    return list(zip(ends, ends[1:], strict=False))
