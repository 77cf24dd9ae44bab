"""Proteins to look at: what the best neurons contribute residue by residue, one protein a class."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.knowledge_neurons import motifs, selection
from analysis.knowledge_neurons.methods import PRIMARY
from analysis.knowledge_neurons.ranking import Found, rankings
from analysis.knowledge_neurons.tuned import Tuned
from train.enzyme import CLASSES


def shown(one: Tuned, found: Found) -> Mapping[str, np.ndarray]:
    """Of one test protein of every class that has one told right: its number, and what each residue contributes.

    ``which`` int[m]; ``values`` float32[residues of all], ``ends`` int[m].
    """
    if one.load("sequences") is None:
        right = np.flatnonzero(one.load("curves/test")["full"] == one.test.labels)
        which = np.array([right[one.test.labels[right] == c][0] for c in range(CLASSES)
                          if (one.test.labels[right] == c).any()], int)
        kept = selection.top(rankings(found, one.layout)[PRIMARY], one.cfg.keep.specific)
        part = one.test.where(np.isin(np.arange(len(one.test)), which))
        values = motifs.residue_scores(one, part, kept)
        one.save("sequences", which=np.sort(which), values=np.float32(np.concatenate([*values, np.zeros(0)])),
                 ends=np.cumsum([len(value) for value in values]))
    return one.load("sequences")


def rows_of(one: Tuned, found: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """name, ec (the class), residues, values (a number each), marked (inside a motif of motifs.py)."""
    rows = []
    for i, end in zip(found["which"], found["ends"], strict=True):
        residues = motifs.read(one, one.test.sequences[i])
        marked = np.logical_or.reduce([motifs.inside(residues, motif.pattern) for motif in motifs.MOTIFS])
        rows.append({"name": one.test.names[i], "ec": int(one.test.labels[i]) + 1, "residues": residues,
                     "values": [round(float(value), 3) for value in found["values"][end - len(residues):end]],
                     "marked": np.flatnonzero(marked).tolist()})
    return rows
