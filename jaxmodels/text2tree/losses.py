"""The two losses of Text2Tree and their sum (Yan et al. 2023; text2tree.md sections 5 to 7).

B texts: h float[B, ...] (features), labels int[B] (multi-class) or {0, 1}[B, K] (multi-label), states H float[K, D].
``valid`` bool[B] marks the texts of a partial batch that are there; the others are in no row, no column, no maximum.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.shapes import Array, Float

METHODS = ("full", "ssl", "dml", "gdml", "plain")
_NEVER = -10_000.0  # section 5: the similarity of a text that is nobody's positive
_TAU = 0.07  # the base temperature of supervised contrastive learning (Khosla et al. 2020), which scales the loss


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """method: ``full``, ``ssl`` (the plain loss for DML), ``dml``, ``gdml`` (``full``, its gradient passing through the
    coefficients of the mixtures too), ``plain``.

    gamma: weight of SSL. tau: its temperature. sim_temperature: of the softmax over label similarities. include_self:
    count j = i among the positives, as the released code does. diag_weight: of the un-mixed pairs. max_batch: beyond
    it each text is mixed with ``partners`` others, not with all.
    """

    method: str = "full"
    gamma: float = 0.01
    tau: float = 1.0
    sim_temperature: float = 1.0
    include_self: bool = False
    diag_weight: float = 1.0
    max_batch: int = 128
    partners: int = 32

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is not one of {', '.join(METHODS)}")
        if not 0 <= self.gamma <= 1:
            raise UserError(f"gamma {self.gamma} must be from 0 to 1")
        for field in ("tau", "sim_temperature", "diag_weight"):
            if getattr(self, field) <= 0:
                raise UserError(f"{field} {getattr(self, field)} must be more than 0")
        if self.partners < 1:
            raise UserError(f"partners {self.partners} must be at least 1")


# Labels of two texts


def similarity(states: Float[Array, "K D"], labels: jax.Array) -> Float[Array, "B B"]:
    """s_ij, the cosine of the label states of two texts; a text without a label is like itself alone."""
    r = normalised(states[labels] if labels.ndim == 1 else labels.astype(states.dtype) @ states)
    s = r @ r.T
    if labels.ndim == 1:
        return s
    some = labels.astype(bool).any(1)
    return jnp.where(some[:, None] & some, s, jnp.where(jnp.eye(len(s), dtype=bool), 1.0, _NEVER))


def pair_weights(s: jax.Array, temperature: float = 1.0, valid: jax.Array | None = None, include_self: bool = True
                 ) -> jax.Array:
    """w_ij, the softmax of s over j: rows sum to 1, or are 0 where no positive is left."""
    allowed = _pairs(len(s), valid)
    if not include_self:
        allowed &= ~jnp.eye(len(s), dtype=bool) & (s > _NEVER)
    w = jax.nn.softmax(jnp.where(allowed, s / temperature, 3 * _NEVER / temperature), axis=-1)
    return jnp.where(allowed, w, 0)


def coefficients(s: jax.Array, temperature: float = 1.0, valid: jax.Array | None = None) -> jax.Array:
    """lam_ij = w_ij / max_k w_ik; 1 on the diagonal."""
    pairs = _pairs(len(s), valid)
    largest = jnp.where(pairs, s, -jnp.inf).max(1, keepdims=True)
    return jnp.exp(jnp.where(pairs, s - largest, 0) / temperature)


# Similarity surrogate learning


def contrastive(h: Float[Array, "B D"], w: Float[Array, "B B"], tau: float, valid: jax.Array | None = None
                ) -> jax.Array:
    """-(tau / 0.07) · mean_i Σ_j w_ij log(exp(z_i·z_j / tau) / Σ_{k≠i} exp(z_i·z_k / tau)), z = h / |h|.

    The mean is over the rows with a positive; 0 if there is none, or but one text. w = 1/n for those of the same label:
    supervised contrastive learning; w = identity: SelfCon.
    """
    z = normalised(h.astype(jnp.float32))
    logits = z @ z.T / tau
    others = _pairs(len(z), valid) & ~jnp.eye(len(z), dtype=bool)
    paired = others.any(1, keepdims=True)
    total = jax.nn.logsumexp(jnp.where(others | ~paired, logits, -jnp.inf), axis=1, keepdims=True)
    rows = jnp.where(paired[:, 0], (w * (logits - total)).sum(1), 0)
    counted = paired[:, 0] & (w > 0).any(1)
    return -(tau / _TAU) * rows.sum() / jnp.maximum(counted.sum(), 1)


# Dissimilarity mixup learning


def mixup(h: jax.Array, lam: jax.Array, labels: jax.Array, head: Callable[[jax.Array], jax.Array], *,
          diag_weight: float = 1.0, valid: jax.Array | None = None, offsets: jax.Array | None = None) -> jax.Array:
    """The mean over pairs of lam_ij l(o_ij, y_i) + (1 - lam_ij) l(o_ij, y_j).

    o_ij = head(lam_ij h_i + (1 - lam_ij) h_j).

    head: features [P, ...] -> logits [P, K]. offsets int[M], 0 first: text i is mixed with i + offsets (mod B), which
    stand for all B; the pairs weigh as all would. Default: all.
    """
    B = len(h)
    j = (jnp.arange(B)[:, None] + (jnp.arange(B) if offsets is None else offsets)) % B  # [B, M], j[:, 0] = i
    M = j.shape[1]
    lam = jnp.take_along_axis(lam, j, axis=1)
    share = lam.reshape(B, M, *[1] * (h.ndim - 1)).astype(h.dtype)
    mixed = share * h[:, None] + (1 - share) * h[j]
    logits = head(mixed.reshape(B * M, *h.shape[1:])).reshape(B, M, -1).astype(jnp.float32)
    each = lam * _of_row(logits, labels) + (1 - lam) * _of_column(logits, labels, j)
    weight = jnp.where(jnp.arange(M) == 0, diag_weight, (B - 1) / max(M - 1, 1)) * jnp.ones((B, 1))
    if valid is not None:
        weight = jnp.where(valid[:, None] & valid[j], weight, 0)
    return jnp.where(weight > 0, weight * each, 0).sum() / jnp.maximum(weight.sum(), 1e-9)


def sample_offsets(key: jax.Array, batch: int, partners: int) -> jax.Array:
    """0 and ``partners`` others out of 1..batch-1, each at most once: every text is then a partner equally often."""
    others = 1 + jax.random.choice(key, batch - 1, (min(partners, batch - 1),), replace=False)
    return jnp.concatenate([jnp.zeros(1, others.dtype), others])


def classification(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of each text, or the mean over labels of the binary ones: float32[B]."""
    return _of_row(logits.astype(jnp.float32)[:, None], labels)[:, 0]


def total(cfg: LossConfig, h: jax.Array, labels: jax.Array, head: Callable[[jax.Array], jax.Array],
          states: jax.Array | None, key: jax.Array, valid: jax.Array | None = None,
          contrasted: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(1 - gamma) · DML + gamma · SSL, or what ``cfg.method`` leaves of it; and its parts.

    states: H float[K, D] of `LabelEmbeddings`; None for ``plain``. contrasted: what SSL reads, [B, D], where the
    features that are mixed are others. key: of the choice of partners.
    """
    def plain():
        return masked_mean(classification(head(h), labels), valid)

    if cfg.method == "plain":
        loss = plain()
        return loss, {"classification": loss}
    if states is None:
        raise UserError(f"method {cfg.method} needs the states of labels; build the model with a tree")
    s = similarity(states, labels)
    parts = {}
    if cfg.method == "ssl":
        parts["classification"] = plain()
    else:
        B = len(h)
        lam = coefficients(s, cfg.sim_temperature, valid)
        lam = lam if cfg.method == "gdml" else jax.lax.stop_gradient(lam)
        offsets = sample_offsets(key, B, cfg.partners) if cfg.max_batch < B else None
        parts["dml"] = mixup(h, lam, labels, head, diag_weight=cfg.diag_weight, valid=valid, offsets=offsets)
    first = next(iter(parts.values()))
    if cfg.method == "dml":
        return first, parts
    w = pair_weights(s, cfg.sim_temperature, valid, cfg.include_self)
    parts["ssl"] = contrastive(h if contrasted is None else contrasted, w, cfg.tau, valid)
    return (1 - cfg.gamma) * first + cfg.gamma * parts["ssl"], parts


def masked_mean(values: jax.Array, valid: jax.Array | None) -> jax.Array:
    """The mean of [B, ...] over the texts that are there."""
    if valid is None:
        return values.mean()
    return jnp.where(valid, values, 0).sum() / jnp.maximum(valid.sum(), 1)


def normalised(x: jax.Array) -> jax.Array:
    """Rows of length 1; a row of zeros stays one, with a gradient of 0."""
    square = (x * x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square > 0, square, 1))


def _pairs(count: int, valid: jax.Array | None) -> jax.Array:
    return jnp.ones((count, count), bool) if valid is None else valid[:, None] & valid


# The loss of mixtures, logits [B, M, K], against the labels of one of the two texts: float32[B, M]. Written as products
# of logits and labels, so that no array of mixed labels is made.


def _of_row(logits, labels):
    """l(o_ij, y_i)."""
    return _against(logits, labels[:, None])


def _of_column(logits, labels, j):
    """l(o_ij, y_j)."""
    return _against(logits, labels[j])


def _against(logits, labels):
    if labels.ndim == 2:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return jax.nn.softplus(logits).mean(-1) - (logits * labels).mean(-1)
