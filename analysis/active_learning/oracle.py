"""Who labels: the corpus itself, or people who put their exports into a folder."""

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxmodels.errors import UserError
from train.data.annotations import Item, identity, item_tags, matched, read_items, write_items
from train.data.conll import Sentence

BATCH = "batch.jsonl"


class Oracle(Protocol):
    def labels(self, places: Sequence[int] | np.ndarray) -> list[Sequence[str]]:
        """IOB2 tags of the pool's sentences at these places."""


class GoldOracle:
    """Answers from a corpus whose labels are there already."""

    def __init__(self, sentences: Sequence[Sentence]):
        self.sentences = sentences

    def labels(self, places: Sequence[int] | np.ndarray) -> list[Sequence[str]]:
        return [self.sentences[i].tags for i in places]


class FileOracle:
    """Answers from the exports that lie in a folder (see `train.data.annotations`), each sentence found by its text:
    the pool's words with spaces between.

    types: that the tagger has; others are refused, with their place; None: any.
    What is asked and not there is written to ``batch.jsonl`` in that folder, and a UserError says so: label it, put the
    export beside and give the same command again.
    """

    def __init__(self, folder: str | Path, pool: Sequence[Sequence[str]], types: Collection[str] | None = None):
        self.folder, self.pool, self.types = Path(folder), pool, types

    def labels(self, places: Sequence[int] | np.ndarray) -> list[Sequence[str]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        files = [path for path in sorted(self.folder.iterdir()) if path.suffix in (".json", ".jsonl")
                 and path.name != BATCH]
        known = matched([item for path in files for item in read_items(path)],
                        {identity(" ".join(words)): "" for words in self.pool})
        asked = {int(i): identity(" ".join(self.pool[i])) for i in places}
        missing = [i for i, name in asked.items() if name not in known]
        if missing:
            self._keep_labels(known)
            texts = dict.fromkeys(" ".join(self.pool[i]) for i in missing)  # one that the pool has twice is asked once
            write_items(self.folder / BATCH, [Item(identity(text), text, ()) for text in texts], "jsonl")
            raise UserError(f"{len(missing)} of {len(asked)} sentences are not labelled yet; label "
                            f"{self.folder / BATCH}, put the export (.json, .jsonl) beside it and give the same "
                            "command again")
        for item in (known[name] for name in asked.values()):
            if self.types and (new := {span.type for span in item.spans} - set(self.types)):
                raise UserError(f"{item.where}: type {min(new)!r} is not one of this study's, which are those of its "
                                f"training part: {', '.join(self.types)}; rename it")
        return [item_tags(known[asked[int(i)]], spaced(self.pool[i]), Counter()) for i in places]

    def _keep_labels(self, known: Collection[str]) -> None:
        """Refuses to write over a batch that somebody has labelled in place: it is not read, and its labels were lost.

        known: ids of what has been read from other files.
        """
        path = self.folder / BATCH
        if path.exists() and any(item.spans and identity(item.text) not in known for item in read_items(path)):
            raise UserError(f"{path} has labels, and would be written over; give it another name in that folder, so "
                            "that they count, and give the same command again")


def spaced(words: Sequence[str]) -> list[tuple[int, int]]:
    """Where words are in their text with a space between each two: [(start, stop)]."""
    stops = list(itertools.accumulate(len(word) + 1 for word in words))
    return [(stop - 1 - len(word), stop - 1) for word, stop in zip(words, stops, strict=True)]
