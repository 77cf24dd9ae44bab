"""From texts to rows of tokens: three parts of each language that never mix, packed into windows."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmodels.errors import UserError
from train.data.sources import LanguageText

PARTS = ("analysis", "selection", "test")
SHARES = (0.5, 0.25, 0.25)  # moe_split.md section 4.1


@dataclasses.dataclass(frozen=True)
class Rows:
    """Windows of one language. tokens int32[R, T]; unit int32[R, T]: which text each token is from; -1 is padding.

    bytes int64[units]: UTF-8 length of each text as far as it is in the windows.
    """

    tokens: np.ndarray
    unit: np.ndarray
    bytes: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        return self.unit >= 0

    @property
    def count(self) -> int:
        return int(self.mask.sum())


@dataclasses.dataclass(frozen=True)
class Language:
    """One language's windows by part, with what the tables say about it."""

    code: str
    name: str
    family: str
    script: str
    variant_of: str | None
    parts: dict[str, Rows]
    fertility: float  # tokens a byte
    replaced: int  # invalid UTF-8 sequences in its source


def divide(count: int, seed: int) -> np.ndarray:
    """int[count]: the part of every text. By position, so that parallel texts fall into the same part everywhere."""
    draws = np.random.default_rng(seed).random(count)
    return np.searchsorted(np.cumsum(SHARES)[:-1], draws, side="right")


def pack(texts: Sequence[str], tokenizer: Any, window: int, tokens: int, separator: str = "\n") -> Rows:
    """Packs texts one after another, each followed by ``separator``, into rows of ``window`` tokens.

    Stops at ``tokens`` tokens (rounded up to whole rows); the last row is filled up with padding.
    """
    ids: list[int] = []
    unit: list[int] = []
    size: list[int] = []
    limit = -(-tokens // window) * window
    for index, text in enumerate(texts):
        row = tokenizer.encode(text + separator, special=False)
        ids += row
        unit += [index] * len(row)
        size.append(len((text + separator).encode("utf-8", "replace")))
        if len(ids) >= limit:
            break
    if len(ids) > limit:  # the last text is cut: count its bytes in proportion
        inside = unit[:limit].count(unit[-1]) / unit.count(unit[-1])
        size[-1] = round(size[-1] * inside)
    ids, unit = ids[:limit], unit[:limit]
    rows = max(1, -(-len(ids) // window))
    padding = rows * window - len(ids)
    return Rows(np.asarray(ids + [0] * padding, np.int32).reshape(rows, window),
                np.asarray(unit + [-1] * padding, np.int32).reshape(rows, window), np.asarray(size, np.int64))


def prepare(texts: Sequence[LanguageText], tokenizer: Any, cfg: Any, panel: Sequence[str], seed: int
            ) -> tuple[list[Language], list[tuple[str, int]]]:
    """Languages with enough text, most text first, and (code, tokens) of those that were left out for too little.

    Raises UserError when a language that was asked for, or one of the panel, has too little text, or none is left.
    """
    wanted = set(cfg.languages)
    known = {t.code for t in texts}
    if missing := sorted(wanted - known):
        raise UserError(f"text source {cfg.source!r} has no language {missing[0]!r}; it has {', '.join(sorted(known))}")
    kept: list[Language] = []
    short: list[tuple[str, int]] = []
    for text in sorted(texts, key=lambda t: -t.characters):
        if wanted and text.code not in wanted:
            continue
        if text.variant_of and not cfg.variants and not (wanted and text.code in wanted):
            continue
        if cfg.max_languages and len(kept) >= cfg.max_languages and text.code not in panel:
            continue
        part = divide(len(text.texts), seed)
        chosen = [[t for t, p in zip(text.texts, part, strict=True) if p == i] for i in range(3)]
        need = {"analysis": cfg.analysis_tokens, "selection": cfg.window, "test": cfg.window}
        if text.code in panel:
            need |= {"selection": cfg.selection_tokens, "test": cfg.test_tokens}
        rows = {name: pack(part_texts, tokenizer, cfg.window, need[name])
                for name, part_texts in zip(PARTS, chosen, strict=True)}
        have = rows["analysis"].count
        if have < cfg.least_tokens:
            if text.code in wanted:
                raise UserError(f"language {text.code!r} has {have} analysis tokens in {cfg.source!r}, "
                                f"text.least_tokens asks for {cfg.least_tokens}; lower it or leave it out")
            short.append((text.code, have))
            continue
        size = sum(int(r.bytes.sum()) for r in rows.values())
        kept.append(Language(text.code, text.name, text.family, text.script, text.variant_of, rows,
                             sum(r.count for r in rows.values()) / max(size, 1), text.replaced))
    for code in panel:
        if code not in {k.code for k in kept}:
            have = dict(short).get(code)
            why = f"has only {have} analysis tokens" if have is not None else "is not in the texts"
            raise UserError(f"panel language {code!r} {why}; set prune.panel to languages of {cfg.source!r}, "
                            f"or lower text.least_tokens ({cfg.least_tokens})")
        rows = next(k for k in kept if k.code == code).parts
        if rows["test"].count < min(1000, cfg.test_tokens):
            raise UserError(f"panel language {code!r} has {rows['test'].count} test tokens, "
                            f"{min(1000, cfg.test_tokens)} are needed; leave it out of prune.panel")
    if len(kept) < 2:
        raise UserError(f"{len(kept)} languages have {cfg.least_tokens} analysis tokens in {cfg.source!r}; "
                        "lower text.least_tokens")
    return kept, short
