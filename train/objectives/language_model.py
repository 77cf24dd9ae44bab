"""Next-token prediction over packed rows, with what a mixture of experts needs to stay balanced."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxmodels.decoder.config import DecoderConfig
from jaxmodels.decoder.model import Decoder
from jaxmodels.experts import balance
from jaxmodels.taps import NO_TAPS, Taps
from train.runtime.step import Sums
from train.settings import BalanceConfig


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Cross-entropy of the next token of the same document. Batch: tokens, segments int32[B, T] (segment 0: padding),
    and, if it is there, bytes int32[B], the UTF-8 bytes that the predicted tokens stand for.
    """

    cfg: DecoderConfig
    balance: BalanceConfig = BalanceConfig()

    @property
    def expert_layers(self) -> list[int]:
        return [layer for layer in range(self.cfg.num_layers) if self.cfg.has_experts(layer)]

    def loss(self, model: Decoder, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Sums]:
        """(summed loss, sums): weight and bytes (predicted tokens and their bytes), nll, correct, router."""
        tokens, segments = batch["tokens"], batch["segments"]
        taps = self._taps(model)
        logits, aux, _ = model.forward(tokens, mask=segments > 0, segments=segments, taps=taps)
        logits = logits.astype(jnp.float32)
        # Whole rows, the last position masked, and targets picked by comparing: slices and look-ups of logits would
        # cost a padding and a scatter of their size in the gradient; an argmax on CPU as much as a product.
        last = jnp.zeros_like(segments[:, :1])
        targets, following = (jnp.concatenate([a[:, 1:], last], 1) for a in (tokens, segments))
        counts = (following == segments) & (following > 0)
        picked = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0).sum(-1)
        nll = jnp.where(counts, jax.nn.logsumexp(logits, -1) - picked, 0).sum()
        sums: Sums = {
            "weight": counts.sum(), "nll": nll,
            "correct": jnp.sum(counts & (picked >= logits.max(-1))),
        }
        if "bytes" in batch:
            sums["bytes"] = batch["bytes"].sum()
        loss = nll
        if "router.logits" in aux:
            sums["router"] = aux["router.logits"]
            stats = self._routed(sums)
            # A mean over the layers and this micro-batch, times its tokens, as the other sums are. (The balancing loss
            # is a product of two means: over several micro-batches it is the mean of theirs.)
            extra = self.balance.z_loss * balance.router_z_loss(stats).mean()
            if self.balance.loss:
                extra += self.balance.loss * balance.load_balancing_loss(stats, self.cfg.experts.top_k).mean()
            loss = nll + extra * sums["weight"]
        return loss, sums

    def metrics(self, loss: jax.Array, sums: Sums) -> dict[str, jax.Array]:
        """loss (nats a token, without what balances), accuracy, bits_per_byte, router.* over the expert layers."""
        weight = jnp.maximum(sums["weight"], 1)
        out = {"loss": sums["nll"] / weight, "accuracy": sums["correct"] / weight}
        if "bytes" in sums:
            out["bits_per_byte"] = sums["nll"] / jnp.log(2.0) / jnp.maximum(sums["bytes"], 1)
        if "router" in sums:
            stats = self._routed(sums)
            load = stats["load"]
            out |= {"objective": loss / weight, "router.load": load / load.sum(-1, keepdims=True),
                    "router.z": balance.router_z_loss(stats).mean()}
            out |= {f"router.{name}": value.mean() for name, value in balance.load_metrics(load).items()}
        return out

    def update(self, rest: Any, sums: Sums) -> Any:
        """Moves the balancing biases towards the experts that got less than their share."""
        if "router" not in sums or not self.cfg.experts.balance_bias or not self.balance.bias_rate:
            return rest
        groups = dict(rest["groups"])
        for group, (start, stop) in enumerate(self.cfg.groups):
            if self.cfg.has_experts(start):
                load = sums["router"]["load"][start:stop]
                move = functools.partial(balance.bias_update, rate=self.balance.bias_rate)
                ffn = groups[group]["ffn"]
                router = {**ffn["router"], "bias": move(ffn["router"]["bias"], load)}
                groups[group] = {**groups[group], "ffn": {**ffn, "router": router}}
        return {**rest, "groups": groups}

    def _routed(self, sums: Sums) -> Sums:
        """Router statistics of the layers that have experts; those of dense layers are zero."""
        return jax.tree.map(lambda a: a[jnp.asarray(self.expert_layers)], sums["router"])

    def _taps(self, model: Decoder) -> Taps:
        experts = self.cfg.experts
        if experts is None or experts.router != "softmax":
            return NO_TAPS
        zeros = jnp.zeros((experts.num_experts,))
        bias = [model.groups[group].ffn.router["bias"][...] if experts.balance_bias and self.cfg.has_experts(start)
                else jnp.broadcast_to(zeros, (stop - start, *zeros.shape))
                for group, (start, stop) in enumerate(self.cfg.groups)]
        statistics = Partial(functools.partial(balance.router_statistics, top_k=experts.top_k), jnp.concatenate(bias))
        return Taps(reduce={"router.logits": statistics})
