"""What can be said of each claim: supported, not supported or not decidable, and why.

*Supported*: with at least three seeds, in every seed. *Not supported*: the opposite in every seed. Anything else is
not decidable by this run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.active_learning import curves
from analysis.active_learning.learner import RoundRecord

YES, NO, OPEN = "supported", "not supported", "not decidable"
SEEDS = 3
PAPER = "24.9 % of the words of OntoNotes English, 30.1 % of Chinese (Shen et al. 2018)"
Records = Mapping[str, Mapping[int, Sequence[RoundRecord]]]


def statements(records: Records, reference: float | None) -> list[dict[str, str]]:
    """Rows of name, claim, verdict, why. reference: F1 on all labels."""
    each, _ = curves.summaries(records, reference)
    by = {(row["strategy"], row["seed"]): row for row in each}
    rows: list[dict[str, str]] = []

    def state(name: str, claim: str, judged: tuple[str, str]) -> None:
        rows.append({"name": name, "claim": claim, "verdict": judged[0], "why": judged[1]})

    for name, label, least in (("mnlp", "MNLP", 0.03), ("bald", "BALD", 0.02), ("lc", "LC", 0.0)):
        if name not in records:
            continue
        gains = [by[name, seed].get(curves.at_share("gain", curves.JUDGED)) for seed in records[name]]
        by_points = f" by at least {100 * least:.0f} points" if least else ""
        state(f"gain.{name}", f"At {100 * curves.JUDGED:.0f} % of the words {label} is above random choice{by_points}.",
              judged([g - least if g is not None else None for g in gains], "F1 above random there: "
                     + _told(gains, "+.3f") if "random" in records else "random was not run"))
        if name != "lc":
            state(f"words.{name}", f"{label} reaches 95 % of the F1 on all labels with fewer words than random choice.",
                  judged_words(records, by, name, reference))
    if {"lc", "mnlp"} <= set(records):
        gaps = [_minus(*(_ratio(records[name][s], "words", "sentences") for name in ("lc", "mnlp")))
                for s in _shared(records, "lc", "mnlp")]
        state("length", "LC picks longer sentences than MNLP.", judged(gaps, f"words more: {_told(gaps, '+.1f')}"))
    if {"random", "mnlp"} <= set(records):
        gaps = [_minus(*(_ratio(records[name][s], "entities", "words", 100) for name in ("mnlp", "random")))
                for s in _shared(records, "random", "mnlp")]
        state("density", "MNLP picks sentences with more entities a word than random choice.",
              judged(gaps, f"entities more in 100 words: {_told(gaps, '+.2f')}"))
    if {"bald", "bald_decoder"} <= set(records):
        # After the last round that both have: an unfinished study is one or more ahead.
        pairs = [list(zip(records["bald"][s], records["bald_decoder"][s], strict=False))[-1]
                 for s in _shared(records, "bald", "bald_decoder")]
        gaps = [abs(one.f1 - other.f1) for one, other in pairs]
        state("decoder", "BALD with dropout in the decoder alone ends within 1 point of BALD.",
              judged([0.01 - gap for gap in gaps], "difference of F1: " + _told(gaps, ".3f")))
    reached = {name: [by[name, s].get("to_99") for s in seeds] for name, seeds in records.items() if name != "random"}
    told = "; ".join(f"{name} {', '.join(map(_percent, values))}" for name, values in reached.items())
    if reference and reached:
        rows.append({"name": "paper", "verdict": OPEN, "claim": "99 % of the F1 on all labels needs about a quarter of "
                     f"the words, as in the paper: {PAPER}.", "why":
                     f"another corpus, another size and another domain; here 99 % is reached at: {told}"})
    return rows


def judged_words(records: Records, by: Mapping[Any, Mapping[str, Any]], name: str, reference: float | None
                 ) -> tuple[str, str]:
    """By the words to 95 %; where one of the two never gets there, by where its curve ends."""
    if not reference or "random" not in records:
        return OPEN, "the reference on all labels, or random choice, was not run"
    gaps: list[float | None] = []
    told = []
    for seed in _shared(records, "random", name):
        mine, other = by[name, seed].get("to_95"), by["random", seed].get("to_95")
        my_end, end = by[name, seed]["share"], by["random", seed]["share"]
        told.append(f"{_within(mine, my_end)} against {_within(other, end)}")
        if mine is not None and other is not None:
            # Equal where the first set, which both share, is enough: then nothing is known of their choices.
            gaps.append(other - mine if other != mine else None)
        elif mine is not None:
            gaps.append(1.0 if mine <= end else None)
        else:
            gaps.append(-1.0 if other is not None and other <= my_end else None)
    return judged(gaps, "share of the words: " + "; ".join(told))


def judged(gaps: Sequence[float | None], why: str) -> tuple[str, str]:
    """gaps: of every seed, above 0 for the claim; None: nothing can be said of it."""
    if not gaps or any(gap is None for gap in gaps):
        return OPEN, why
    if len(gaps) < SEEDS:
        return OPEN, f"{why}; {len(gaps)} of the {SEEDS} seeds that a verdict needs"
    if all(gap > 0 for gap in gaps):
        return YES, why
    return (NO, why) if all(gap <= 0 for gap in gaps) else (OPEN, f"{why}; the seeds disagree")


def _shared(records: Records, a: str, b: str) -> list[int]:
    return sorted(set(records[a]) & set(records[b]))


def _ratio(rounds: Sequence[RoundRecord], what: str, of: str, scale: float = 1.0) -> float | None:
    """Of what a strategy has picked after the first set, which was drawn; None where it has picked nothing yet."""
    total, base = (sum(getattr(one, f"picked_{name}") for one in rounds[1:]) for name in (what, of))
    return scale * total / base if base else None


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _told(values: Sequence[float | None], form: str) -> str:
    return ", ".join("not reached" if value is None else format(value, form) for value in values)


def _within(value: float | None, end: float) -> str:
    """Of a curve that ends at `end`."""
    return f"more than {_percent(end)}" if value is None else _percent(value)


def _percent(value: float | None) -> str:
    return "not reached" if value is None else f"{100 * value:.1f} %"
