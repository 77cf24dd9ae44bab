"""What a masked language model is asked: 15 % of the residues, of those 80 % hidden, 10 % replaced, 10 % shown.

Counts, not coins (our choice; the ESM-2 paper gives the shares alone): of a protein with n residues, the numbers of
hidden, replaced and shown residues are the shares of n, rounded down or up at random so that each is exact in the
mean (one draw u for a protein: the cuts are floor(share * n + u)). Every protein then has its share of the questions,
and the scale of ESM's token dropout, which depends on the number of ``<mask>``, hardly varies.

Only the 20 standard residues are asked for and put in as replacements; ``<cls>``, ``<eos>``, ``<pad>``, X, B, Z, U and
O never (the collator of transformers draws replacements from all 33 tokens). A replacement may be the residue itself.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.esm.alphabet import MASK, STANDARD

VERSION = 1  # of the transform: part of a run's fingerprint
NOTHING = -1  # in targets: not asked


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """How much is asked, and how it is hidden (Devlin et al. 2019, section 3.1; Lin et al. 2023, appendix A.2)."""

    share: float = 0.15  # of the residues of a protein
    hidden: float = 0.8  # of those, behind <mask>
    replaced: float = 0.1  # of those, by a residue drawn from the 20; the rest are shown as they are

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise UserError(f"masking.share={self.share} must lie above 0 and not above 1")
        if min(self.hidden, self.replaced) < 0 or self.hidden + self.replaced > 1 + 1e-9:
            raise UserError(f"masking.hidden + masking.replaced = {self.hidden:g} + {self.replaced:g} is more than "
                            "1; lower one")


@dataclasses.dataclass(frozen=True)
class Masking:
    """A random transform (`train.data.pipeline`): records with tokens and segments, int32[T], get targets int32[T].

    targets: the residue where it is asked for, -1 elsewhere; tokens are what the model sees.
    """

    cfg: MaskingConfig = MaskingConfig()

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        tokens, segments = record["tokens"], record["segments"]
        asked, fate = choose(tokens, segments, self.cfg, rng)
        shown = tokens[asked]
        shown[fate == 0] = MASK
        drawn = np.asarray(STANDARD, np.int32)[(rng.random(len(fate)) * len(STANDARD)).astype(int)]
        shown = np.where(fate == 1, drawn, shown)
        seen, targets = tokens.copy(), np.full_like(tokens, NOTHING)
        seen[asked], targets[asked] = shown, tokens[asked]
        return {**record, "tokens": seen, "targets": targets}


def choose(tokens: np.ndarray, segments: np.ndarray, cfg: MaskingConfig, rng: np.random.Generator
           ) -> tuple[np.ndarray, np.ndarray]:
    """(places that are asked for int[k], their fate int[k]: 0 hidden, 1 replaced, 2 shown) of one row."""
    places = np.flatnonzero((tokens >= STANDARD[0]) & (tokens <= STANDARD[-1]) & (segments > 0))
    owner = segments[places]
    counts = np.bincount(owner, minlength=int(segments.max(initial=0)) + 1)  # residues of each protein
    draws, offsets = rng.random(len(places)), rng.random(len(counts))  # one number a residue, one a protein
    order = np.lexsort((draws, owner))  # residues of a protein side by side, in random order
    rank = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
    cuts = cfg.share * np.array([cfg.hidden, cfg.hidden + cfg.replaced, 1.0])
    # 1e-9: 0.15 * 20 is 3, not 2.9999999999999996
    ends = np.floor(np.outer(cuts, counts) + offsets + 1e-9)  # [3, proteins]
    fate = (rank >= np.repeat(ends, counts, axis=1)).sum(0)
    asked = fate < 3
    return places[order][asked], fate[asked]
