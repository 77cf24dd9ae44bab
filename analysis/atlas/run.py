"""The stages of the atlas. Each unit of work is written when it is done, so any interruption costs at most one."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import numpy as np

import jaxmodels
from analysis.atlas import studies
from analysis.atlas.collect import Collector, expert_k, token_histogram
from analysis.atlas.config import AtlasConfig
from analysis.atlas.quality import Scorer
from analysis.atlas.text import Language, prepare
from jaxmodels.errors import UserError
from jaxmodels.experts.models import ffn_layers
from jaxmodels.experts.split import find_split
from jaxmodels.hub.resolve import resolve
from jaxmodels.hub.tokenizer import load_tokenizer
from train.data.sources import is_source, text_source
from train.runtime.files import write_json


@dataclasses.dataclass
class Atlas:
    """What the stages share."""

    cfg: AtlasConfig
    run: Any
    model: Any
    tokenizer: Any
    languages: list[Language]
    perm: np.ndarray
    num_experts: int
    collector: Collector
    scorer: Scorer
    dense: dict[bytes, Any] = dataclasses.field(default_factory=dict)  # scores of the whole model, by test rows

    @property
    def k(self) -> int:
        """k of the main share."""
        return expert_k(self.cfg.profile.main_share, self.num_experts)

    @property
    def panel(self) -> list[Language]:
        by_code = {lang.code: lang for lang in self.languages}
        return [by_code[code] for code in self.cfg.prune.panel]


def run(cfg: AtlasConfig, folder: Any) -> None:
    """Runs or finishes the atlas in a run folder; see the package's docstring."""
    if folder.results().get("finished"):  # nothing to do: the report is rebuilt from what is there
        return
    path = resolve(cfg.model)
    tokenizer = load_tokenizer(path)
    languages, short = prepare(text_source(cfg.text.source), tokenizer, cfg.text, cfg.prune.panel, cfg.seed)
    if not is_source(cfg.prune.transfer):
        text_source(cfg.prune.transfer)  # says what there is
    model = jaxmodels.load(path)
    check_model(model, cfg)
    perm, num_experts = split_layers(model, cfg, folder)
    collector = Collector(model, perm, cfg, num_experts, folder)
    atlas = Atlas(cfg, folder, model, tokenizer, languages, perm, num_experts, collector, Scorer(model))
    write_languages(atlas, short)
    collector.collect([(lang, "analysis") for lang in languages]
                      + [(lang, "selection") for lang in languages if lang.code in cfg.prune.panel])
    studies.profiles(atlas)
    studies.lape_study(atlas)
    studies.pruning(atlas)
    if cfg.prune.recover:
        studies.recovery(atlas)
    studies.speed(atlas)
    folder.write_results({"finished": True})


def check_model(model: Any, cfg: AtlasConfig) -> None:
    """Raises UserError for a model that the atlas cannot cut up, before anything is read."""
    if model.cfg.experts is not None:
        raise UserError(f"{cfg.model} has experts already; the atlas splits a dense model")
    if len(set(model.cfg.ffn_widths)) > 1:
        raise UserError(f"the layers of {cfg.model} have unequal widths (it was pruned); give the whole model")
    if cfg.prune.recover and model.cfg.norm_placement != "pre":
        raise UserError(f"{cfg.model} normalises after its layers, which repair lacks; set prune.recover=false")


def split_layers(model, cfg: AtlasConfig, folder) -> tuple[np.ndarray, int]:
    """(perm int[L, F], E): every layer's neurons in expert order, found once and kept."""
    key = hashlib.sha256(json.dumps([cfg.model, dataclasses.asdict(cfg.split), cfg.seed]).encode()).hexdigest()[:12]
    found = folder.load_npz(f"cache/split-{key}")
    if found is None:
        options = {"method": cfg.split.method, "vector": cfg.split.vector, "restarts": cfg.split.restarts,
                   "expert_size": cfg.split.expert_size}
        splits = []
        layers = ffn_layers(model)
        with folder.progress(len(layers), "splitting layers") as advance:
            for layer, ffn in enumerate(layers):
                splits.append(find_split({n: np.asarray(w) for n, w in ffn.items()}, seed=cfg.seed + layer, **options))
                advance()
                folder.check_stop()
        folder.save_npz(f"cache/split-{key}", labels=np.stack([s.labels for s in splits]),
                        perm=np.stack([s.perm for s in splits]), centres=np.stack([s.centres for s in splits]),
                        objective=np.asarray([s.objective for s in splits]))
        found = folder.load_npz(f"cache/split-{key}")
    return found["perm"], found["centres"].shape[1]


def write_languages(atlas: Atlas, short: list[tuple[str, int]]) -> None:
    """What was read, for the report: one row a language, and what was left out."""
    rows = [{"code": lang.code, "name": lang.name, "family": lang.family, "script": lang.script,
             "variant_of": lang.variant_of, "tokens_per_byte": lang.fertility, "replaced": lang.replaced,
             "analysis_tokens": lang.parts["analysis"].count} for lang in atlas.languages]
    write_json(atlas.run.path("languages.json"), {"languages": rows, "left_out": short})
    histograms = np.stack([token_histogram(lang, atlas.model.cfg.vocab_size) for lang in atlas.languages])
    atlas.run.save_npz("cache/histograms", counts=histograms)
    atlas.run.write_results({
        "languages": len(rows), "experts_per_layer": atlas.num_experts, "layers": atlas.model.cfg.num_layers,
        "device": jax.devices()[0].device_kind})
