"""Which neurons of a protein encoder carry what it knows about enzymes: a study after Nori et al. 2023.

Pre-trains a small ESM-2 encoder on uniprot20k, fine-tunes it three times for the top-level EC class (enzyme_ec), scores
every neuron of six sites by activation and by integrated gradients, keeps or drops shares of them (of all, of one site,
with an epoch of retraining), says where the best are and whether they attend to known motifs. The protocol is ours; of
the paper (arXiv 2312.10770) only the claims of the abstract are known here. The report answers each claim with
supported, not supported or not decidable, and why.

    jaxmodels run esm_knowledge_neurons                       # about four hours on two cores
    jaxmodels run esm_knowledge_neurons preset=quick          # all stages in minutes; decides no claim
    jaxmodels run esm_knowledge_neurons preset=tiny           # checks an installation; its numbers mean nothing
    jaxmodels run esm_knowledge_neurons tuned=runs/esm_enzyme-0123abcd,runs/esm_enzyme-4567cdef

Two cores decide the sizes: a mask costs a pass over the test proteins, and a fine-tuning has hundreds of masks. So the
curves are of 24 of each class, and contributions of 8 proteins of each class, those of single sites of 2. Proteins are
read up to 510 residues, as in the fine-tuning: with 190, which takes half the time, the whole model was no better than
one without neurons, and no curve meant anything; so it is with `quick`, which has one fine-tuning besides, and a claim
needs two that agree. On a GPU take score.length=1024 score.max_steps=80
score.gate_examples=none keep.proteins=none.
"""

from analysis.knowledge_neurons.config import StudyConfig

PRESETS: dict[str, dict[str, object]] = {
    "tiny": {
        "pretrain.model.d_model": 32, "pretrain.model.layers": 2, "pretrain.model.heads": 2,
        "pretrain.data.length": 128, "pretrain.data.batch": 8, "pretrain.data.limit": 200,
        "pretrain.data.validation_rows": 8, "pretrain.loop.steps": 6, "pretrain.loop.evaluate_every": 6,
        "pretrain.loop.save_every": 6,
        "enzyme.model.d_model": 32, "enzyme.model.layers": 2, "enzyme.model.heads": 2, "enzyme.data.length": 128,
        "enzyme.data.batch": 8, "enzyme.data.limit": 60, "enzyme.data.external": False, "enzyme.bootstrap": 100,
        "enzyme.loop.steps": 8, "enzyme.loop.evaluate_every": 8, "enzyme.loop.save_every": 8,
        "seeds": 2, "score.length": 64, "score.tokens": 256, "score.steps": 4, "score.max_steps": 4,
        "score.gate_examples": 2, "score.site_examples": 2,
        "keep.shares": (0.05, 0.3, 1.0), "keep.proteins": 4, "keep.bootstrap": 100,
        "keep.site_shares": (0.1, 0.3), "keep.retrain_shares": (0.2,), "where.permutations": 100,
        "where.shares": (0.05, 0.1),
    },
    "quick": {
        "pretrain.model.d_model": 64, "pretrain.model.layers": 4, "pretrain.loop.steps": 200,
        "pretrain.loop.evaluate_every": 100, "pretrain.loop.save_every": 100, "pretrain.data.validation_rows": 64,
        "seeds": 1, "enzyme.loop.steps": 256, "enzyme.loop.evaluate_every": 64, "enzyme.loop.save_every": 128,
        "enzyme.data.external": False, "enzyme.bootstrap": 500,
        "score.length": 128, "score.gate_examples": 4, "score.site_examples": 2, "score.steps": 8,
        "score.max_steps": 16,
        "keep.shares": (0.02, 0.1, 0.3, 1.0), "keep.seeds": 1, "keep.proteins": 12, "keep.site_shares": (0.1,),
        "keep.retrain_shares": (),  # four epochs of training: as long as all the rest
    },
}
NEEDS = ("uniprot20k", "enzyme_ec", "nrpdb_ec", "care_task1")
MINUTES: dict[str, float] = {"quick": 3.8}


def get_config() -> StudyConfig:
    return StudyConfig()
