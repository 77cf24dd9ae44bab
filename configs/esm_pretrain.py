"""Trains a small ESM-2 encoder from random weights to fill in hidden residues of proteins.

Reads UniProt entries (uniprot20k: 19,188 distinct sequences) or a FASTA file, holds whole families out for validation,
packs proteins into rows and asks for 15 % of their residues. The report shows perplexity beside two floors that know no
network (composition; the two neighbours), for all questions and for hidden residues alone. See docs/proteins.md.

Recorded (2026-11-25, 3,000 steps, 1.2 million parameters): perplexity 14.3 over all questions, floors 15.17 and 15.07;
16.95 over hidden residues, floors 18.09 and 17.98. 74 minutes beside other work; a step takes 0.72 s on two free cores.

    jaxmodels run esm_pretrain
    jaxmodels run esm_pretrain preset=tiny                              # under a minute: checks an installation
    jaxmodels run esm_pretrain data.source=path:mine.fasta model.size=esm2_8m
"""

from train.protein_config import ProteinPretrainConfig

PRESETS: dict[str, dict[str, object]] = {
    "tiny": {
        "model.d_model": 32, "model.layers": 2, "model.heads": 2, "data.length": 128, "data.batch": 8,
        "data.limit": 400, "data.validation_rows": 16, "loop.steps": 30, "loop.evaluate_every": 15,
        "loop.save_every": 15,
    },
    "quick": {"loop.steps": 200, "loop.evaluate_every": 100, "loop.save_every": 100, "data.validation_rows": 64},
}
NEEDS = ("uniprot20k",)
MINUTES: dict[str, float] = {"default": 74}


def get_config() -> ProteinPretrainConfig:
    return ProteinPretrainConfig()
