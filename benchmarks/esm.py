"""The ESM encoder beside transformers (sdpa) and esm2quinox on the same weights, and packed rows beside padded ones.

    jaxmodels bench esm [--out FILE]     # two CPU cores: about ten minutes; peers: torch, esm2quinox

Forward (all logits) and forward with backward (masked-LM loss, gradients of all parameters) of the 35M configuration,
float32, 8 proteins of 350 residues, random weights, in turns in one process; results are compared first. None of the
proteins is padded, so transformers is given no attention mask, its fastest way.

Packed: whole proteins in rows of 1,024 tokens (segments), against batches of 8 proteins in random order, padded to the
longest of each, and against batches of proteins of like length, padded to 128, 256, 512 or 1,024 tokens. The 8M
configuration, one forward pass (and backward) over the same proteins and the same masked residues in all three, sums of
the loss compared; compilation is not counted, although padding to the longest compiles once for every length. Proteins:
every n-th of the distinct ones of uniprot20k by length, in pieces of at most 1,022 residues.
"""

import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxmodels
from benchmarks._report import check_out, machine, publish
from benchmarks._timing import Samples, cores, take_turns
from jaxmodels.errors import UserError
from jaxmodels.esm.alphabet import CLS, EOS, PAD, STANDARD, encode, pad_batch
from jaxmodels.esm.config import EsmConfig
from jaxmodels.esm.model import Esm
from train.data.buckets import bucketed
from train.data.masking import NOTHING, Masking
from train.data.packing import pack_whole
from train.data.proteins import crops, distinct, protein_source

COLUMNS = ("what", "beside", "ours", "theirs", "unit", "ratio", "bar", "result")
BARS = {("forward", "transformers"): 1.0, ("packed, forward", "padded"): 1.6,
        ("packed, forward+backward", "padded"): 1.6}
PASSES = ("forward", "forward+backward")
PEERS = ("torch", "transformers", "esm2quinox")
BATCH, LENGTH, PROTEINS = 8, 350, 48  # proteins of a batch, residues of each; proteins that are packed
ROW, ROWS = 1024, 4  # tokens of a packed row, rows of a batch; a bucket's batch has as many tokens
Run = Callable[[], tuple[Any, ...]]
Batch = tuple[np.ndarray, np.ndarray | None, np.ndarray]


def main(out: str | None, *, config: EsmConfig | None = None, packed_config: EsmConfig | None = None,
         batch: int = BATCH, length: int = LENGTH, proteins: int = PROTEINS, repeats: Sequence[int] = (9, 5, 3)
         ) -> None:
    """Measures, prints a table, and writes ``out``. repeats: of the forward pass, with backward, of the packed rows."""
    check_out(out)
    about, notes = machine(PEERS), ["ratio: above 1 is in our favour; medians of turns, the JSON holds p10 and p90"]
    with tempfile.TemporaryDirectory() as folder:
        rows = beside_peers(Path(folder), config or EsmConfig.esm2_35m(), batch, length, repeats[:2])
    notes += [f"{name} is not installed: not measured" for name in PEERS if name not in about["peers"]]
    try:
        pieces = sample(proteins)
    except UserError as error:
        notes.append(f"packed against padded not measured: {error}")
    else:
        rows += packed_beside_padded(packed_config or EsmConfig.esm2_8m(), pieces, batch, repeats[2])
    elsewhere = max(side["elsewhere"] for row in rows for side in row["samples"].values())
    notes += [f"other processes took up to {elsewhere:.0%} of the cores meanwhile",
              " ".join((__doc__ or "").split("\n\n", 2)[2].split())]
    publish("ESM, float32", rows, COLUMNS, about, notes, out)


def compare(what: str, ours: Samples, others: Mapping[str, Samples], residues: int, **more: Any) -> list[dict]:
    """A row for each of the others, in residues/s; our own alone where there is none."""
    mine = {"what": what, "ours": residues / ours.median, "unit": "residues/s", "residues": residues, **more}
    rows = []
    for name, samples in others.items():
        ratio, bar = samples.median / ours.median, BARS.get((what, name))
        verdict = None if bar is None else "met" if ratio >= bar else "missed"
        rows.append({**mine, "beside": name, "theirs": residues / samples.median, "ratio": ratio, "bar": bar,
                     "result": verdict, "samples": {"ours": ours.summary(), name: samples.summary()}})
    return rows or [{**mine, "samples": {"ours": ours.summary()}}]


def masked_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Summed cross-entropy in nats, float32[], of logits [B, T, V] where targets, int[B, T], are not -1."""
    # Picked by comparing, as in train/objectives: a look-up costs a scatter in the gradient.
    picked = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0).sum(-1)
    return jnp.where(targets != NOTHING, jax.nn.logsumexp(logits, -1) - picked, 0).sum()


def asked(tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(tokens as the model sees them, targets with -1 where nothing is asked), int32[T] each, of one protein."""
    record = Masking()({"tokens": tokens, "segments": np.ones_like(tokens)}, rng)
    return record["tokens"], record["targets"]


# Beside the peers


def beside_peers(folder: Path, config: EsmConfig, batch: int, length: int, repeats: Sequence[int]) -> list[dict]:
    """Rows of both passes. folder: for the weights, which all sides load."""
    jaxmodels.save(Esm(config, rngs=nnx.Rngs(0)), folder / "model")
    rng = np.random.default_rng(0)
    residues = rng.integers(STANDARD[0], STANDARD[-1] + 1, (batch, length))
    rows = np.pad(residues, ((0, 0), (1, 1)), constant_values=((0, 0), (CLS, EOS))).astype(np.int32)
    tokens, targets = map(np.stack, zip(*(asked(row, rng) for row in rows), strict=True))
    here = {name: make for name, make in SIDES.items() if all(map(importlib.util.find_spec, NEEDS[name]))}
    sides = {name: make(folder / "model", tokens, targets) for name, make in here.items()}
    found = []
    for passed, count in zip(PASSES, repeats, strict=True):
        runs = {name: side[passed] for name, side in sides.items()}
        apart = differences(passed, {name: run() for name, run in runs.items()})
        samples = take_turns(runs, count, warmup=1)
        found += compare(passed, samples.pop("jaxmodels"), samples, batch * length, batch=batch, length=length,
                         config=dataclasses.asdict(config), differences=apart)
    return found


def differences(passed: str, results: Mapping[str, tuple[Any, ...]]) -> dict[str, list[float]]:
    """How far each side's results, logits or loss and gradient, are from ours, as a share of what is allowed.

    Allowed: logits and loss 1e-4, absolute and relative; the gradient of the embedding, to which all layers and the
    head add, 1e-3 of its largest. RuntimeError beyond: another result would be other work, and the ratio worthless.
    """
    ours, *others = ([np.asarray(part, np.float64) for part in parts] for parts in results.values())
    limits = [1e-4 * (1 + np.abs(ours[0])), *(1e-3 * np.abs(part).max() for part in ours[1:])]
    apart = {}
    for name, parts in zip(list(results)[1:], others, strict=True):
        apart[name] = [float((np.abs(a - b) / limit).max()) for a, b, limit in zip(ours, parts, limits, strict=True)]
        if not max(apart[name]) <= 1:
            raise RuntimeError(f"{passed}: {name} is {max(apart[name]):.3g} times as far from ours as rounding allows: "
                               "the two did not do the same work")
    return apart


def ours(path: Path, tokens: np.ndarray, targets: np.ndarray) -> dict[str, Run]:
    graphdef, params = nnx.split(jaxmodels.load(path))
    return in_jax(lambda params, tokens: nnx.merge(graphdef, params).forward(tokens)[0], params,
                  lambda gradient: gradient["embed"][...], tokens, targets)


def equinox(path: Path, tokens: np.ndarray, targets: np.ndarray) -> dict[str, Run]:
    """esm2quinox, mapped over the batch as its documentation says, with the weights of a file of transformers."""
    import equinox as eqx
    import esm2quinox
    from safetensors.numpy import load_file

    config, weights = jaxmodels.load(path).cfg, load_file(path / "model.safetensors")
    model = esm2quinox.ESM2(config.num_layers, config.d_model, config.num_heads, config.token_dropout,
                            key=jax.random.key(0))

    def stacked(name: str) -> jax.Array:
        return jnp.stack([weights[f"esm.encoder.layer.{i}.{name}"] for i in range(config.num_layers)])

    places = {"attn.query_proj": "attention.self.query", "attn.key_proj": "attention.self.key",
              "attn.value_proj": "attention.self.value", "attn.output_proj": "attention.output.dense",
              "layer_norm1": "attention.LayerNorm", "layer_norm2": "LayerNorm", "linear1": "intermediate.dense",
              "linear2": "output.dense"}
    values = {f"layers.{place}.{kind}": stacked(f"{name}.{kind}") for place, name in places.items()
              for kind in ("weight", "bias")}
    places = {"layer_norm": "esm.encoder.emb_layer_norm_after", "logit_head.linear1": "lm_head.dense",
              "logit_head.layer_norm": "lm_head.layer_norm"}
    values |= {f"{place}.{kind}": weights[f"{name}.{kind}"] for place, name in places.items()
               for kind in ("weight", "bias")}
    values |= {"logit_head.linear2.weight": weights["esm.embeddings.word_embeddings.weight"],
               "logit_head.linear2.bias": weights["lm_head.bias"]}
    model = eqx.tree_at(lambda model: [attribute(model, name) for name in values], model,
                        [jnp.asarray(value) for value in values.values()])
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return in_jax(lambda params, tokens: jax.vmap(eqx.combine(params, static))(tokens).logits, params,
                  lambda gradient: gradient.logit_head.linear2.weight, tokens, targets)


def attribute(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name)
    return model


def in_jax(logits: Callable, params: Any, embedding: Callable, tokens: np.ndarray, targets: np.ndarray
           ) -> dict[str, Run]:
    """Both passes of logits(params, tokens); embedding picks its gradient out of that of the parameters."""
    def loss(params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        return masked_nll(logits(params, tokens), targets) / (targets != NOTHING).sum()

    forward, backward = jax.jit(logits), jax.jit(jax.value_and_grad(loss))

    def both() -> tuple[Any, ...]:
        value, gradient = jax.block_until_ready(backward(params, tokens, targets))
        return value, embedding(gradient)

    return {"forward": lambda: (jax.block_until_ready(forward(params, tokens)),), "forward+backward": both}


def transformers(path: Path, tokens: np.ndarray, targets: np.ndarray) -> dict[str, Run]:
    import torch
    from transformers import EsmForMaskedLM, logging

    torch.set_num_threads(cores())
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it reports that rotary frequencies, which it computes, are not in the file
    model = EsmForMaskedLM.from_pretrained(path, attn_implementation="sdpa", dtype=torch.float32).eval()
    ids, labels = torch.from_numpy(tokens).long(), torch.from_numpy(np.where(targets == NOTHING, -100, targets)).long()

    def forward() -> tuple[Any, ...]:
        with torch.inference_mode():
            return (model(ids).logits,)

    def both() -> tuple[Any, ...]:
        model.zero_grad(set_to_none=True)
        loss = model(ids, labels=labels).loss
        loss.backward()
        return loss.detach(), model.esm.embeddings.word_embeddings.weight.grad

    return {"forward": forward, "forward+backward": both}


SIDES = {"jaxmodels": ours, "transformers": transformers, "esm2quinox": equinox}
NEEDS = {"jaxmodels": (), "transformers": ("torch", "transformers"), "esm2quinox": ("esm2quinox", "equinox")}


# Packed beside padded


def sample(count: int) -> list[np.ndarray]:
    """Ids, int32[T] with <cls> and <eos>, of `count` pieces of uniprot20k at equal steps of the order by length.

    At equal steps and not at random, so that few of them have the lengths of all; fewer where there are not so many.
    """
    proteins = distinct(protein_source("uniprot20k").proteins)
    pieces = sorted((piece for protein in proteins for piece in crops(protein.sequence, ROW - 2)), key=len)
    steps = ((np.arange(min(count, len(pieces))) + 0.5) * len(pieces) / min(count, len(pieces))).astype(int)
    return [encode(pieces[step])[0] for step in steps]


def packed_beside_padded(config: EsmConfig, pieces: Sequence[np.ndarray], batch: int, repeats: int) -> list[dict]:
    """Rows of both passes: packed against padded and against bucketed."""
    graphdef, params = nnx.split(Esm(config, rngs=nnx.Rngs(0)))
    sides = batches(pieces, batch)
    residues = sum(len(piece) - 2 for piece in pieces)
    padding = {name: 1 - sum(map(len, pieces)) / sum(tokens.size for tokens, *_ in side) for name, side in
               sides.items()}

    def nll(params: Any, tokens: jax.Array, segments: jax.Array | None, targets: jax.Array) -> jax.Array:
        return masked_nll(nnx.merge(graphdef, params).forward(tokens, segments=segments)[0], targets)

    programs: dict[str, Callable] = {"forward": jax.jit(nll), "forward+backward": jax.jit(jax.value_and_grad(nll))}
    rows = []
    for passed, program in programs.items():
        runs = {name: functools.partial(total, program, params, side) for name, side in sides.items()}
        losses = {name: run() for name, run in runs.items()}
        if not np.allclose(list(losses.values()), losses["packed"], rtol=1e-4, atol=0):
            raise RuntimeError(f"{passed}: the summed losses {losses} differ: the sides did not do the same work")
        samples = take_turns(runs, repeats, warmup=0)  # compiled and warm by then
        rows += compare(f"packed, {passed}", samples.pop("packed"), samples, residues, proteins=len(pieces),
                        padding=padding, batches={name: [list(one[0].shape) for one in side] for name, side in
                                                  sides.items()}, config=dataclasses.asdict(config))
    return rows


def total(program: Callable, params: Any, side: Sequence[tuple[Any, ...]]) -> float:
    """The loss in nats, summed over the batches of a side, each done before the next begins."""
    results = (jax.block_until_ready(program(params, *one)) for one in side)
    return sum(float(jax.tree.leaves(result)[0]) for result in results)  # the loss comes before its gradient


def batches(pieces: Sequence[np.ndarray], batch: int) -> dict[str, list[Batch]]:
    """(tokens, segments or None, targets), int32[B, T] each, of every batch of each side."""
    rng = np.random.default_rng(0)
    shown, targets = zip(*(asked(piece, rng) for piece in pieces), strict=True)

    def padded(index: Sequence[int], length: int | None = None) -> Batch:
        wanted = pad_batch([targets[i] for i in index], length)
        return pad_batch([shown[i] for i in index], length), None, np.where(wanted == PAD, NOTHING, wanted)

    packed, wanted = pack_whole(shown, ROW, PAD), pack_whole(targets, ROW, NOTHING)  # equal lengths: in equal places
    order = rng.permutation(len(pieces))
    return {
        "packed": [(packed["tokens"][i:i + ROWS], packed["segments"][i:i + ROWS], wanted["tokens"][i:i + ROWS])
                   for i in range(0, len(packed["tokens"]), ROWS)],
        "padded": [padded(order[i:i + batch]) for i in range(0, len(order), batch)],
        # Without the copies that fill the last batch of a bucket: nothing in a whole corpus, much among so few.
        "bucketed": [padded(one.index, one.tokens.shape[1]) for one in bucketed(shown, ROWS * ROW)],
    }
