"""What the atlas can be told. ``jaxmodels run atlas --help`` lists it; configs/atlas.py holds the presets."""

import dataclasses

from analysis.atlas.rules import BEST, MAIN, RULES
from jaxmodels.errors import UserError


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Texts to read and how much of them."""

    source: str = "gettext"  # text source: gettext, udhr, tico19, path:DIR, tfds:NAME
    languages: tuple[str, ...] = ()  # only these languages; empty: all with enough text
    max_languages: int = 0  # at most this many, those with most text first; 0: no limit
    variants: bool = False  # count regional variants (es-MX beside es) as languages of their own
    window: int = 128  # tokens in a row that the model sees together
    analysis_tokens: int = 6144  # tokens a language for profiles, or all it has
    least_tokens: int = 2560  # languages with fewer analysis tokens are left out
    selection_tokens: int = 4096  # tokens of each panel language for choosing what to keep and for repairs
    test_tokens: int = 1024  # tokens of each panel language for measuring quality
    skip: int = 4  # first positions of a window that are not counted: attention sinks
    batch: int = 16  # rows in one call of the model


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """How feed-forward layers are split into experts."""

    method: str = "kmeans"  # kmeans or random
    expert_size: int = 32  # neurons of an expert
    vector: str = "gate"  # gate, up or concat: what stands for a neuron in kmeans
    restarts: int = 2  # starts of kmeans, the best is kept


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Activity and what is computed from it."""

    shares: tuple[float, ...] = (0.1, 0.2, 0.3)  # active share of experts; the first listed main_share is the default
    main_share: float = 0.2  # the share that maps, families and pruning use
    neurons: bool = True  # also rank single neurons on the selection texts (for one of the pruning rules)
    permutations: int = 10_000  # label shuffles of the family tests
    lape_rate: float = 0.01  # share of all neurons that LAPE picks


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """Keeping only some experts, and repairing what is left."""

    panel: tuple[str, ...] = ("en", "de", "fr", "es", "ru", "pl", "tr", "id")  # languages of the tables
    others: int = 3  # each language's list is also scored on this many other panel languages
    shares: tuple[float, ...] = (0.75, 0.5, 0.25)  # share of the feed-forward layers that is kept
    rules: tuple[str, ...] = RULES  # how the kept parts are chosen; random comes on top
    random_seeds: int = 4
    lape_seeds: int = 3  # random controls of the intervention matrix
    interventions: tuple[str, ...] = ("zero", "mean", "p10", "p90")  # what language neurons are set to
    bootstrap: int = 1000
    recover: bool = True  # bias compensation and refit of the down projections
    transfer: str = "udhr"  # other-domain test text of the recovery table; the main source's test part if absent
    repair_shares: tuple[float, ...] = (0.75, 0.5)  # shares that are repaired
    repair_languages: int = 8  # panel languages that are repaired, in the order of the panel
    refit_tokens: int = 6144  # calibration tokens of the refit, from the main texts
    own_tokens: int = 8192  # and tokens that the model writes itself after their openings
    distill: tuple[str, ...] = ("fr",)  # repaired languages whose smallest model is then distilled; empty: none
    distill_tokens: int = 24_576  # tokens of its own that it is then distilled on, beside refit_tokens of the texts
    distill_steps: int = 250  # steps of the distillation, of 4 windows each


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    """Tokens a second of pruned models against the dense one, timed in turn."""

    shares: tuple[float, ...] = (0.5, 0.25)
    prefill: int = 512  # tokens of the prefill
    decode: int = 32  # tokens decoded at batch 1
    repeats: int = 7


_POSITIVE = ("text.window", "text.test_tokens", "text.selection_tokens", "text.batch", "split.expert_size",
             "split.restarts", "profile.permutations", "prune.random_seeds", "prune.bootstrap",
             "prune.repair_languages", "prune.refit_tokens", "prune.distill_steps", "speed.prefill", "speed.decode",
             "speed.repeats")


@dataclasses.dataclass(frozen=True)
class AtlasConfig:
    """The whole study."""

    model: str = "smollm2-135m-instruct"  # path or name of the weights
    seed: int = 0
    text: TextConfig = TextConfig()
    split: SplitConfig = SplitConfig()
    profile: ProfileConfig = ProfileConfig()
    prune: PruneConfig = PruneConfig()
    speed: SpeedConfig = SpeedConfig()
    entry: str = "analysis.atlas.run:run"
    report: str = "analysis.atlas.report:build"

    def __post_init__(self):
        if self.profile.main_share not in self.profile.shares:
            raise UserError(f"profile.main_share {self.profile.main_share} is not one of profile.shares "
                            f"{list(self.profile.shares)}; add it there")
        for name in _POSITIVE:
            part, _, key = name.partition(".")
            value = getattr(getattr(self, part), key)
            if value < 1:
                raise UserError(f"{name} {value} must be at least 1")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} must be at least 0")
        if not 0 < self.profile.lape_rate <= 1:
            raise UserError(f"profile.lape_rate {self.profile.lape_rate} must be above 0 and at most 1")
        if len(self.prune.panel) < 2:
            raise UserError(f"prune.panel {list(self.prune.panel)} must name at least 2 languages")
        if self.split.method not in ("kmeans", "random"):
            raise UserError(f"split.method {self.split.method!r}: the atlas splits by kmeans or random; the methods "
                            "that read text are in jaxmodels split")
        for name, shares in (("profile.shares", self.profile.shares), ("prune.shares", self.prune.shares),
                             ("prune.repair_shares", self.prune.repair_shares), ("speed.shares", self.speed.shares)):
            if not shares or not all(0 < s <= 1 for s in shares):
                raise UserError(f"{name} {list(shares)} must be numbers above 0 and at most 1")
        if unknown := sorted(set(self.prune.rules) - set(RULES)):
            raise UserError(f"prune.rules has {unknown[0]!r}; choose from {'; '.join(RULES)}")
        if not {MAIN, BEST} <= set(self.prune.rules):
            raise UserError(f"prune.rules must hold {MAIN!r} and {BEST!r}, which the tables compare")
        if unknown := sorted(set(self.prune.interventions) - {"zero", "mean", "p10", "p90"}):
            raise UserError(f"prune.interventions has {unknown[0]!r}; choose from zero, mean, p10, p90")
        if self.prune.interventions[:1] != ("zero",):
            raise UserError("prune.interventions must begin with zero, which the tables and controls refer to")
        if self.text.least_tokens > self.text.analysis_tokens:
            raise UserError(f"text.least_tokens {self.text.least_tokens} is above text.analysis_tokens "
                            f"{self.text.analysis_tokens}; lower it")
        if unknown := sorted(set(self.prune.distill) - set(self.prune.panel[:self.prune.repair_languages])):
            raise UserError(f"prune.distill has {unknown[0]!r}, which is not repaired; choose from the first "
                            f"{self.prune.repair_languages} (prune.repair_languages) of prune.panel")
        if self.text.window <= self.text.skip + 1:
            raise UserError(f"text.window {self.text.window} must exceed text.skip {self.text.skip} by at least 2")
