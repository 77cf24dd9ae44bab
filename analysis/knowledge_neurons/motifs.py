"""Whether the best neurons attribute more to known motifs than to the same residues elsewhere (spec 5.3).

A residue has the summed contribution of the neurons in the top share, in one protein, over the mean absolute one of
that protein's residues. Inside the matches of a motif it is averaged, and compared with as many positions of the same
residue types, drawn anywhere in the same proteins. A match lies in one piece and the draws do not: where neighbours
contribute alike, p is too small (of contributions that are means over 5 residues about one in five is below 0.05 by
chance).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from analysis.attribution import class_probability, integrated_gradients
from analysis.knowledge_neurons import selection
from analysis.knowledge_neurons.methods import PRIMARY
from analysis.knowledge_neurons.neurons import POINTS
from analysis.knowledge_neurons.ranking import Found, rankings
from analysis.knowledge_neurons.tuned import Tuned, activations
from jaxmodels.errors import UserError
from train.enzyme import Labelled

ENOUGH = 5  # proteins below which nothing is said


class Motif(NamedTuple):
    """name; pattern: a regular expression, "." for any residue; label: the class it is looked for in, None for all."""

    name: str
    pattern: str
    label: int | None


MOTIFS = (Motif("serine hydrolase", "G.S.G", 2), Motif("nucleotide binding", "G.G..G", None))


class Drawn(NamedTuple):
    """values float64[1 + draws]: the mean inside the matches, then that of each draw; spread: standard deviation of the
    residues of the types that match; matches: residues inside."""

    values: np.ndarray
    spread: float
    matches: int


def inside(sequence: str, pattern: str) -> Bool[np.ndarray, "T"]:
    """Residues that lie in a match; matches may overlap."""
    found = np.zeros(len(sequence), bool)
    for match in re.finditer(f"(?=({pattern}))", sequence):
        found[match.start():match.start() + len(match[1])] = True
    return found


def permuted(sequences: Sequence[str], values: Sequence[Float[np.ndarray, "T"]], pattern: str, draws: int,
             seed: int = 0) -> Drawn:
    """Draws of positions of the same residue types, as many of each type and protein as the matches have.

    values: of every residue of each protein. Raises UserError where nothing matches.
    """
    r, total, matches, alike = np.random.default_rng(seed), np.zeros(1 + draws), 0, []
    for sequence, value in zip(sequences, values, strict=True):
        letters, here = np.array(list(sequence)), inside(sequence, pattern)
        for letter in sorted(set(letters[here])):
            places = np.flatnonzero(letters == letter)
            count = int(here[places].sum())
            order = r.random((draws, len(places))).argsort(1)[:, :count]
            total[0] += value[places[here[places]]].sum()
            total[1:] += value[places[order]].sum(1)
            matches += count
            alike.append(value[places])
    if not matches:
        raise UserError(f"no protein has a match of {pattern}; give some that do")
    return Drawn(total / matches, float(np.concatenate(alike).std()), matches)


def examples(one: Tuned, motif: Motif) -> Labelled:
    """Correctly classified proteins with a match, of the test part first, then of the training part."""
    test, (_, predicted) = one.load("curves/test"), activations(one)
    joined = Labelled(one.test.sequences + one.train.sequences, np.concatenate([one.test.labels, one.train.labels]),
                      one.test.names + one.train.names)
    right = np.concatenate([test["full"], predicted]) == joined.labels
    wanted = [good and (motif.label is None or label == motif.label)
              and bool(inside(read(one, sequence), motif.pattern).any())
              for good, label, sequence in zip(right, joined.labels, joined.sequences, strict=True)]
    return joined.where(np.isin(np.arange(len(joined)), np.flatnonzero(wanted)[:one.cfg.where.motif_proteins]))


def read(one: Tuned, sequence: str) -> str:
    """What the model reads of a protein."""
    return sequence[:one.cfg.score.length - 2]


def residue_scores(one: Tuned, part: Labelled, kept: Bool[np.ndarray, "n"]) -> list[Float[np.ndarray, "T"]]:
    """Of every residue of each protein, the summed contribution of some neurons over the mean absolute one."""
    masks, out = one.layout.arrays(kept.astype(np.float32)), [np.zeros(0)] * len(part)
    zeros, cfg = one.layout.arrays(np.zeros(one.layout.size, np.float32)), one.cfg.score
    for batch in one.batches(part):
        found = integrated_gradients(
            one.model, batch.tokens, point=POINTS, target=class_probability(batch.fill(part.labels)), mode="gate",
            baseline=zeros, tokens="each", options={"output": "class"}, steps=cfg.steps, max_steps=cfg.max_steps)
        value = sum(np.asarray((a * masks[p]).sum((0, *range(3, a.ndim)))) for p, a in found.values.items())  # [B, T]
        for row, i in enumerate(batch.index):
            mine = value[row, 1:1 + len(read(one, part.sequences[i]))].astype(float)  # <cls> is before them
            out[i] = mine / max(np.abs(mine).mean(), np.finfo(np.float32).tiny)
        one.run.check_stop()
    return out


def check(one: Tuned, found: Found) -> Mapping[str, np.ndarray]:
    """``NAME.values``, ``.spread``, ``.matches`` as `Drawn`, and ``.proteins``; too few proteins: that number alone."""
    if one.load("motifs") is None:
        kept, out = selection.top(rankings(found, one.layout)[PRIMARY], one.cfg.keep.specific), {}
        for motif in MOTIFS:
            part = examples(one, motif)
            out[f"{motif.name}.proteins"] = len(part)
            if len(part) >= ENOUGH:
                drawn = permuted([read(one, sequence) for sequence in part.sequences], residue_scores(one, part, kept),
                                 motif.pattern, one.cfg.where.permutations, one.cfg.seed)
                out |= {f"{motif.name}.{key}": value for key, value in drawn._asdict().items()}
        one.save("motifs", **out)
    return one.load("motifs")


def rows_of(motifs: Mapping[str, Int[np.ndarray, "..."]], number: int) -> list[dict[str, Any]]:
    """Table rows of one fine-tuning: effect (in standard deviations of like residues), p (one-sided) and a verdict."""
    rows = []
    for motif in MOTIFS:
        row = {"motif": motif.name, "pattern": motif.pattern, "fine_tuning": number,
               "proteins": int(motifs[f"{motif.name}.proteins"])}
        values = motifs.get(f"{motif.name}.values")
        if values is None:
            rows.append(row | {"matches": None, "effect": None, "p": None, "verdict":
                               f"not decidable: {row['proteins']} correctly classified proteins have it, fewer than "
                               f"{ENOUGH}"})
            continue
        spread = float(motifs[f"{motif.name}.spread"])
        p = float((1 + (values[1:] >= values[0]).sum()) / len(values))
        rows.append(row | {"matches": int(motifs[f"{motif.name}.matches"]), "inside": float(values[0]),
                           "elsewhere": float(values[1:].mean()), "p": p,
                           "effect": float((values[0] - values[1:].mean()) / spread) if spread else 0.0,
                           "verdict": "more than elsewhere" if p < 0.05 else "not decidable"})
    return rows
