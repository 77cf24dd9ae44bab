"""The questions that the atlas asks, one function each. Every function writes its arrays and flat results once."""

import collections
import math
from typing import Any

import numpy as np

from analysis.activations import pick_taps
from analysis.atlas import classes, families, similarity
from analysis.atlas.collect import batches, expert_k
from analysis.atlas.intervals import excess, panel_excess
from analysis.atlas.lape import change_summary, lape, random_like
from analysis.atlas.pruning import Scores, mask_of, plan
from analysis.atlas.quality import Scorer, Texts
from analysis.atlas.repair import Calibration, own_words, rank_neurons, sequential_refit
from analysis.atlas.rules import BEST, MAIN
from analysis.atlas.text import Rows, pack
from jaxmodels.experts.models import prune, stack, unroll, with_down
from jaxmodels.experts.recover import keep_last
from train.data.sources import text_source, where
from train.distill import distill, teacher_targets

RECOVERY = ("masked", "repaired", "distilled")  # what is done to a pruned model, each on top of the one before


def profiles(atlas: Any) -> None:
    """Frequencies, similarity, split-half reliability, families, expert classes (moe_split.md sections 4.2 to 4.5)."""
    run, langs = atlas.run, atlas.languages
    if run.load_npz("profiles") is not None:
        return
    found = [atlas.collector.get(lang, "analysis") for lang in langs]
    tokens = np.stack([a["tokens"] for a in found])  # [A, 2]
    arrays: dict[str, np.ndarray] = {"tokens": tokens}
    results: dict[str, Any] = {}
    for share in atlas.cfg.profile.shares:
        k = expert_k(share, atlas.num_experts)
        counts = np.stack([a[f"expert_top_{k}"] for a in found])  # [A, 2, L, E]
        halves = [similarity.frequencies(counts[:, h], tokens[:, h], k) for h in (0, 1)]
        f = similarity.frequencies(counts.sum(1), tokens.sum(1), k)
        reliability = similarity.split_half(*halves)
        tag = f"_{share:g}"
        results |= {f"split_half_centred{tag}": float(np.mean(reliability.centred)),
                    f"split_half_centred_lowest{tag}": float(np.min(reliability.centred)),
                    f"split_half_raw{tag}": float(np.mean(reliability.raw)),
                    f"split_half_floor{tag}": float(np.mean(reliability.floor))}
        arrays |= {f"frequency{tag}": f.astype(np.float32), f"reliability{tag}": reliability.centred,
                   f"reliability_raw{tag}": reliability.raw}
    f = arrays[f"frequency_{atlas.cfg.profile.main_share:g}"].astype(np.float64)
    results |= _families(atlas, f, arrays)
    labels = [lang.family or None for lang in langs]
    kinds = classes.classify(f, labels)
    arrays |= {"class_counts": kinds.counts(), "class_of_language": kinds.by_language(),
               "jaccard": similarity.jaccard_top(f), "jensen_shannon": similarity.jensen_shannon(f)}
    for name, count in zip(classes.CLASSES, kinds.counts().sum(0), strict=True):
        results[f"class_{name.replace(' ', '_').replace('-', '_')}"] = int(count)
    sensitivity = classes.sensitivity(f, labels)
    arrays["class_sensitivity"] = np.stack([s.counts().sum(0) for s in sensitivity.values()])
    run.write_results(results)
    run.save_npz("profiles", **arrays)
    run.check_stop()


def _families(atlas: Any, f: np.ndarray, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Which languages group together, and whether more than script and shared tokens explain it (4.4)."""
    run, langs, permutations = atlas.run, atlas.languages, atlas.cfg.profile.permutations
    centred = similarity.centre(f)
    r = similarity.correlation(centred)
    # Regional variants of one language count once; languages without a known family are left out of these tests.
    use = np.asarray([i for i, lang in enumerate(langs) if lang.family and not lang.variant_of], int)
    labels = [langs[i].family for i in use]
    tree = families.dendrogram(r)
    arrays |= {"similarity": r, "order": tree.order, "linkage": tree.linkage, "used": use}
    if len(use) < 3:  # texts under names that are no language codes: nothing to compare with
        return {"cophenetic": tree.cophenetic}
    inside = r[np.ix_(use, use)]
    overall = families.within_between(inside, labels, permutations, atlas.cfg.seed)
    layers = similarity.correlation_by_layer(centred)
    curve = families.within_between_curve(layers[:, use][:, :, use], labels, permutations, atlas.cfg.seed)
    histogram = families.histogram_distance(run.load_npz("cache/histograms")["counts"][use])
    script = 1.0 - families.same([langs[i].script for i in use])
    distance, related = 1.0 - inside, families.family_distance(labels)
    mantel = {"alone": (), "tokens": (histogram,), "script": (script,), "tokens and script": (histogram, script)}
    results: dict[str, Any] = {
        "family_within": overall.within, "family_between": overall.between, "family_difference": overall.difference,
        "family_p": overall.p, "cophenetic": tree.cophenetic,
        "adjusted_rand": families.adjusted_rand(families.dendrogram(inside), labels)}
    for name, controls in mantel.items():
        found = families.partial_mantel(distance, related, controls, permutations, atlas.cfg.seed)
        results |= {f"mantel_r_{name.replace(' ', '_')}": found.r, f"mantel_p_{name.replace(' ', '_')}": found.p}
    for name, family in overall.per_family.items():
        results |= {f"family_{name}_within": family.within, f"family_{name}_p": family.p}
    by_code = {lang.code: i for i, lang in enumerate(langs)}
    for a, b in (("hi", "ur"), ("ur", "ar"), ("hi", "bn")):
        if a in by_code and b in by_code:
            results[f"r_{a}_{b}"] = float(r[by_code[a], by_code[b]])
    near = families.nearest_neighbours(inside, 1)[:, 0]
    share = [labels[j] == labels[i] for i, j in enumerate(near) if labels.count(labels[i]) > 1]
    results["nearest_neighbour_in_family"] = float(np.mean(share)) if share else None
    arrays |= {"curve": np.stack([curve.difference, curve.low, curve.high, curve.p]), "nearest": use[near]}
    return results


def lape_study(atlas: Any) -> None:
    """Neurons of one language, and what happens when they are switched off (moe_split.md section 5)."""
    run, cfg = atlas.run, atlas.cfg
    if run.load_npz("lape") is not None:
        return
    found = [atlas.collector.get(lang, "analysis") for lang in atlas.languages]
    positive = np.stack([a["positive_gate"].sum(0) for a in found])
    picked = lape(positive, np.asarray([a["tokens"].sum() for a in found]), top_rate=cfg.profile.lape_rate)
    codes = [lang.code for lang in atlas.languages]
    panel = atlas.panel
    dense = {lang.code: _dense(atlas, lang.parts["test"]) for lang in panel}
    modes = cfg.prune.interventions
    change = np.zeros((len(modes), len(panel), len(panel)))
    control = np.zeros((cfg.prune.lape_seeds, len(panel), len(panel)))
    constants = _constants(atlas, picked.picked) if len(modes) > 1 else {}
    jobs = [(i, mode, None) for i in range(len(panel)) for mode in modes]
    jobs += [(i, "zero", seed) for i in range(len(panel)) for seed in range(cfg.prune.lape_seeds)]
    with run.progress(len(jobs), "switching off language neurons") as advance:
        for i, mode, seed in jobs:
            name = f"cache/lape/{panel[i].code}-{mode}" + ("" if seed is None else f"-random{seed}")
            row = run.load_npz(name)
            if row is None:
                neurons = picked.language[codes.index(panel[i].code)]
                if seed is not None:
                    neurons = random_like(neurons, seed)
                # A random control is read in the language itself and in one other.
                read = panel if seed is None else [panel[i], panel[(i + 1) % len(panel)]]
                add = np.where(neurons, constants[mode], 0) if mode != "zero" else None
                scores = {lang.code: atlas.scorer(lang.parts["test"], ~neurons, add).per_token for lang in read}
                row = {"change": np.asarray([scores.get(lang.code, np.nan) - dense[lang.code].per_token
                                             for lang in panel])}
                run.save_npz(name, **row)
            if seed is None:
                change[modes.index(mode), i] = row["change"]
            else:
                control[seed, i] = row["change"]
            advance(1, panel[i].name)
            run.check_stop()
    summaries, random = [change_summary(c) for c in change], [change_summary(c) for c in control]
    summary = summaries[0]
    for mode, other in zip(modes[1:], summaries[1:], strict=True):
        run.write_results({f"lape_{mode}_diagonal": other.diagonal, f"lape_{mode}_off_diagonal": other.off_diagonal})
    run.write_results({
        "lape_neurons": int(picked.picked.sum()), "lape_diagonal": summary.diagonal,
        "lape_off_diagonal": summary.off_diagonal, "lape_ratio": summary.ratio,
        "lape_rows_largest_on_diagonal": summary.largest_on_diagonal,
        "lape_random_diagonal": float(np.mean([s.diagonal for s in random])) if random else None})
    run.save_npz("lape", picked=picked.picked, language=picked.language, entropy=picked.entropy, change=change,
                 control=control)


def _constants(atlas: Any, picked: np.ndarray) -> dict[str, np.ndarray]:
    """float32[L, F]: mean, 10th and 90th percentile of h of the picked neurons over the panel's selection texts."""
    most = int(picked.sum(1).max())
    index = np.argsort(~picked, axis=1, kind="stable")[:, :most]  # the picked ones first
    taps, values = pick_taps(index), []
    for lang in atlas.panel:
        for tokens, mask, _ in batches(lang.parts["selection"], atlas.cfg.text.batch):
            _, aux = atlas.model(tokens, mask=mask, taps=taps, logits="none")
            counted = mask & (np.arange(mask.shape[1]) >= atlas.cfg.text.skip)
            values.append(np.asarray(aux["ffn.hidden"])[:, counted])
    h = np.concatenate(values, axis=1)  # [L, tokens, M]
    found = {"mean": h.mean(1), "p10": np.quantile(h, 0.1, axis=1), "p90": np.quantile(h, 0.9, axis=1)}
    out = {}
    for name, value in found.items():
        out[name] = np.zeros(picked.shape, np.float32)
        np.put_along_axis(out[name], index, value.astype(np.float32), 1)
    return out


def _dense(atlas: Any, rows: Rows) -> Texts:
    """Dense scores of test rows, computed once in a process."""
    key = rows.tokens.tobytes()
    if key not in atlas.dense:
        atlas.dense[key] = atlas.scorer(rows)
    return atlas.dense[key]


def pruning(atlas: Any) -> None:
    """Every rule and control at every share, on the language itself and on others (moe_split.md section 4.6)."""
    run, cfg = atlas.run, atlas.cfg.prune
    if run.load_npz("pruning") is not None:
        return
    panel = atlas.panel
    tests = {lang.code: lang.parts["test"] for lang in panel}
    scores = {lang.code: Scores.of(atlas.collector.get(lang, "selection"), atlas.perm, atlas.num_experts, atlas.k)
              for lang in panel}
    norms = np.asarray(atlas.collector.norms)
    rows: list[dict[str, Any]] = []
    seeds: dict[tuple[str, float, str, str], list[np.ndarray]] = collections.defaultdict(list)
    jobs = [(lang.code, job) for lang in panel for job in plan(cfg, lang.code, tuple(tests))]
    with run.progress(len(jobs), "pruning") as advance:
        for code, (scheme, share, seed, test) in jobs:
            mask = mask_of(scheme, scores[code], share, atlas.perm, panel=list(scores.values()), norms=norms,
                           seed=seed)
            if mask is not None:
                name = f"cache/pruning/{code}-{test}-{scheme.replace(' ', '_')}-{share:g}-{seed}"
                kept = run.load_npz(name)
                if kept is None:
                    kept = {"nll": atlas.scorer(tests[test], mask).nll}
                    run.save_npz(name, **kept)
                rows.append(_row(atlas, code, test, scheme, share, seed, mask, kept["nll"]))
                seeds[scheme, share, code, test].append(kept["nll"])
            advance(1, code)
            run.check_stop()
    _pruning_results(atlas, rows)
    _write_rows(atlas, "pruning_means", _panel_means(atlas, seeds))
    _write_rows(atlas, "pruning", rows)  # last: what marks the stage as done


def _panel_means(atlas: Any, seeds: dict[tuple[str, float, str, str], list[np.ndarray]]) -> list[dict[str, Any]]:
    """Excess loss of every rule and share, mean over the panel, with the interval of that mean."""
    tests = {lang.code: _dense(atlas, lang.parts["test"]) for lang in atlas.panel}
    cases: dict[tuple[str, float, bool], list[tuple]] = collections.defaultdict(list)
    for (scheme, share, code, test), found in seeds.items():
        cases[scheme, share, code == test].append((tests[test].nll, np.mean(found, 0), tests[test].tokens))
    rows = []
    for (scheme, share, own), case in cases.items():
        interval = panel_excess(case, atlas.cfg.prune.bootstrap, atlas.cfg.seed)
        rows.append({"scheme": scheme, "share": share, "own": own, "excess": interval.value, "low": interval.low,
                     "high": interval.high})
    return rows


def _row(atlas: Any, code: str, test: str, scheme: str, share: float, seed: int, mask: np.ndarray,
         nll: np.ndarray) -> dict[str, Any]:
    lang = next(x for x in atlas.panel if x.code == test)
    dense = _dense(atlas, lang.parts["test"])
    samples = atlas.cfg.prune.bootstrap
    token, byte = (excess(dense.nll, nll, d, samples, atlas.cfg.seed) for d in (dense.tokens, dense.bytes))
    return {"language": code, "test": test, "scheme": scheme, "share": share, "seed": seed,
            "kept": float(mask.mean()), "dense": dense.per_token, "excess": token.value, "low": token.low,
            "high": token.high, "excess_byte": byte.value, "low_byte": byte.low, "high_byte": byte.high}


def _write_rows(atlas: Any, name: str, rows: list[dict[str, Any]]) -> None:
    """A table as columns in one npz (strings as fixed-width unicode, so nothing needs pickle)."""
    atlas.run.save_npz(name, **{key: np.asarray([row[key] for row in rows]) for key in rows[0]})


def _pruning_results(atlas: Any, rows: list[dict[str, Any]]) -> None:
    results: dict[str, Any] = {}
    for share in atlas.cfg.prune.shares:
        own = [r for r in rows if r["share"] == share and r["language"] == r["test"]]
        for scheme in dict.fromkeys(r["scheme"] for r in own):
            values = [r["excess"] for r in own if r["scheme"] == scheme]
            results[f"excess_{scheme.replace(' ', '_')}_{share:g}"] = float(np.mean(values))
        wins = 0
        for lang in atlas.panel:
            best = [r for r in own if r["language"] == lang.code and r["scheme"] == MAIN]
            random = [r for r in own if r["language"] == lang.code and r["scheme"] == "random"]
            wins += bool(best and random and best[0]["high"] < min(r["low"] for r in random))
        results[f"frequency_beats_random_clearly_{share:g}"] = wins
        for scheme in (MAIN, BEST):
            other = [r["excess"] for r in rows if r["share"] == share and r["scheme"] == scheme
                     and r["language"] != r["test"]]
            if other:
                results[f"excess_other_{scheme.replace(' ', '_')}_{share:g}"] = float(np.mean(other))
    atlas.run.write_results(results)


def recovery(atlas: Any) -> None:
    """Pruned models repaired without training, tested on text of another domain than they were repaired with."""
    run, cfg = atlas.run, atlas.cfg
    if run.load_npz("recovery") is not None:
        return
    transfer = _transfer_rows(atlas)
    rows: list[dict[str, Any]] = []
    jobs = [(lang, share) for lang in atlas.panel[:cfg.prune.repair_languages]
            for share in cfg.prune.repair_shares]
    with run.progress(len(jobs) * atlas.model.cfg.num_layers, "repairing pruned models") as advance:
        for lang, share in jobs:
            name = f"cache/recovery/{lang.code}-{share:g}"
            found = run.load_npz(name)
            if found is None:
                found = _repair_one(atlas, lang, share, transfer[lang.code], lambda: advance(1, lang.name))  # noqa: B023
                run.save_npz(name, **found)
            else:
                advance(atlas.model.cfg.num_layers, lang.name)
            for step in RECOVERY:
                if step in found:
                    token = excess(found["dense"], found[step], found["tokens"], cfg.prune.bootstrap, cfg.seed)
                    rows.append({"language": lang.code, "share": share, "step": step, "excess": token.value,
                                 "low": token.low, "high": token.high,
                                 "dense": float(found["dense"].sum() / found["tokens"].sum())})
            run.check_stop()
    results = {}
    for share in cfg.prune.repair_shares:
        for step in RECOVERY:
            if values := [r["excess"] for r in rows if r["share"] == share and r["step"] == step]:
                results[f"recovery_{step}_{share:g}"] = float(np.mean(values))
    run.write_results(results)
    _write_rows(atlas, "recovery", rows)


def _repair_one(atlas: Any, lang: Any, share: float, test: Rows, advance: Any) -> dict[str, np.ndarray]:
    cfg = atlas.cfg.prune
    tokens, mask = _calibration(atlas, lang, cfg.own_tokens)
    text = Calibration(atlas.model, tokens, mask)
    ranking = atlas.run.load_npz(f"cache/ranking/{lang.code}")
    if ranking is None:
        ranking = {"order": rank_neurons(text, min(cfg.repair_shares))}
        atlas.run.save_npz(f"cache/ranking/{lang.code}", **ranking)
    keep = keep_last(ranking["order"], share)
    repair = sequential_refit(text, keep, advance=advance)
    repaired = with_down(atlas.model, repair.down, repair.bias)
    dense = _dense(atlas, test)
    found = {"dense": dense.nll, "masked": atlas.scorer(test, keep).nll, "repaired": Scorer(repaired)(test, keep).nll,
             "tokens": dense.tokens, "residual": repair.residual}
    if lang.code in cfg.distill and share == min(cfg.repair_shares):
        tokens, mask = _calibration(atlas, lang, cfg.distill_tokens)
        student = stack(prune(repaired, keep))
        targets = teacher_targets(atlas.model, tokens, mask)
        with atlas.run.progress(cfg.distill_steps, "distilling") as step:
            def count(steps: int, note: str) -> None:
                step(steps, f"{lang.name}, {note}")
                atlas.run.check_stop()

            student, losses = distill(student, targets, tokens, mask, steps=cfg.distill_steps, minutes=math.inf,
                                      seed=atlas.cfg.seed, advance=count)
        found |= {"distilled": Scorer(student)(test).nll, "distillation_loss": np.asarray(losses)}
    return found


def _calibration(atlas: Any, lang: Any, own: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask) of the language's analysis and selection texts, and ``own`` tokens that the model writes."""
    cfg, window = atlas.cfg, atlas.cfg.text.window
    parts = [lang.parts[name] for name in ("analysis", "selection")]
    tokens, mask = (np.concatenate([getattr(p, name) for p in parts]) for name in ("tokens", "mask"))
    limit = max(1, cfg.prune.refit_tokens // window)
    tokens, mask = tokens[:limit], mask[:limit]
    if count := own // window:
        name = f"cache/own_words/{lang.code}-{count}"
        found = atlas.run.load_npz(name)
        if found is None:
            found = {"tokens": own_words(unroll(atlas.model), tokens, mask, count, seed=cfg.seed)}
            atlas.run.save_npz(name, **found)
        tokens = np.concatenate([tokens, found["tokens"]])
        mask = np.concatenate([mask, np.ones(found["tokens"].shape, bool)])
    return tokens, mask


def _transfer_rows(atlas: Any) -> dict[str, Rows]:
    """Test rows of another domain for every panel language, else the main source's own test part."""
    cfg = atlas.cfg
    own = {lang.code: lang.parts["test"] for lang in atlas.panel}
    # The run's first answer stands: the texts may be elsewhere when it is resumed.
    name = atlas.run.results().get("recovery_tested_on") or _domain(atlas)
    atlas.run.write_results({"recovery_tested_on": name})
    if name != cfg.prune.transfer:
        return own
    texts = {t.code: t for t in text_source(cfg.prune.transfer)}
    return {code: pack(_of_language(texts, code).texts, atlas.tokenizer, cfg.text.window,
                       cfg.text.test_tokens + cfg.text.window) for code in own}


def _domain(atlas: Any) -> str:
    cfg = atlas.cfg
    held_out = f"{cfg.text.source}, held-out part"
    if cfg.prune.transfer == cfg.text.source:
        return held_out
    if where(cfg.prune.transfer) is None:
        return f"{held_out} ({cfg.prune.transfer} is not here)"
    texts = {t.code: t for t in text_source(cfg.prune.transfer)}
    lacking = [lang.code for lang in atlas.panel if _of_language(texts, lang.code) is None]
    return f"{held_out} ({cfg.prune.transfer} lacks {lacking[0]})" if lacking else cfg.prune.transfer


def _of_language(texts: dict[str, Any], code: str) -> Any:
    """The text of a language, else of its main variant (of German spellings the newest), else of any, or None."""
    base = code.split("-")[0]
    kin = sorted((t for c, t in texts.items() if c.split("-")[0] == base), key=lambda t: bool(t.variant_of))
    return texts.get(code) or (kin[0] if kin else None)


def speed(atlas: Any) -> None:
    """Measured tokens a second of statically pruned models (analysis/atlas/speed.py)."""
    from analysis.atlas.speed import measure

    if atlas.run.load_npz("speed") is not None:
        return
    lang = atlas.panel[0]
    scores = Scores.of(atlas.collector.get(lang, "selection"), atlas.perm, atlas.num_experts, atlas.k)
    rows = measure(atlas.model, np.asarray(scores.neuron_contribution), atlas.cfg.speed, atlas.run)
    atlas.run.write_results({f"speed_{row['phase']}_{row['share']:g}_of_ceiling": row["of_ceiling"] for row in rows
                             if row["share"] < 1})
    _write_rows(atlas, "speed", rows)
