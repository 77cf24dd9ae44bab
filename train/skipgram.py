"""Word vectors from a pool's own text: skip-gram with negative sampling (Mikolov et al. 2013, arXiv 1310.4546).

Made for a million words on a CPU: the centres of a batch share their negative samples, so that what they cost is one
matrix product. A window reaches to each side of a word in its sentence; the nearer half of it counts more, as windows
are drawn shorter. Frequent words are left out at random (section 2.3), rare ones have no vector.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.errors import UserError

BATCH, SHARED = 512, 256  # centres of a step; negative samples that they share
NEGATIVES = 5  # that each pair weighs
FLOOR = 3  # times that a word has to occur
OFTEN = 1e-3  # share of the text above which a word is left out at random
RATE = 2e-3  # of Adam, falling to 0
SCANNED = 25  # steps between two looks at the clock and at signals


def skipgram(sentences: Iterable[Sequence[str]], width: int, *, window: int = 5, epochs: int = 10, seed: int = 0,
             often: float = OFTEN, rate: float = RATE, advance: Callable[[int], object] = lambda n: None,
             check: Callable[[], None] = lambda: None) -> dict[str, np.ndarray]:
    """Vectors float32[width] of the words of sentences, lower-cased.

    advance: called with numbers of finished steps, of `steps_of(frequent(...), epochs)`. check: called as often.
    Raises UserError for a text in which no two words occur often enough.
    """
    rows = [[word.lower() for word in words] for words in sentences]
    counts = Counter(word for words in rows for word in words)
    words = sorted(word for word, n in counts.items() if n >= FLOOR)
    if len(words) < 2:
        raise UserError(f"{len(words)} words occur {FLOOR} times or more; give more text, or vectors.name=random")
    ids = {word: i for i, word in enumerate(words)}
    # Sentences end to end with a window between them, so that none sees the next.
    stream = np.concatenate([np.append([ids.get(word, -1) for word in row], [-1] * window) for row in rows]).astype(
        np.int32)
    stream = np.pad(stream, (window, window), constant_values=-1)
    frequency = np.array([counts[word] for word in words], float)
    share = frequency / frequency.sum()
    keep = jnp.asarray(np.minimum(np.sqrt(often / share) + often / share, 1), jnp.float32)
    drawn = (np.cumsum(frequency ** 0.75) / (frequency ** 0.75).sum()).astype(np.float32)

    places = np.flatnonzero(stream >= 0)
    steps = steps_of(len(places), epochs)
    key = jax.random.key(seed)
    params = {"in": jax.random.uniform(key, (len(words), width), minval=-0.5, maxval=0.5) / width,
              "out": jnp.zeros((len(words), width))}
    state = params, _optimizer(rate, steps).init(params)
    r, stream = np.random.default_rng(seed), jnp.asarray(stream)
    order = np.concatenate([r.permutation(places) for _ in range(epochs)])
    order = np.resize(order, steps * BATCH).reshape(-1, min(steps, SCANNED), BATCH)
    for number, centres in enumerate(order):
        check()
        state = _steps(window, rate, steps, state, stream, centres, keep, drawn, jax.random.fold_in(key, number + 1))
        jax.block_until_ready(state)
        advance(len(centres))
    vectors = np.asarray(state[0]["in"])
    return dict(zip(words, vectors, strict=True))


def frequent(sentences: Iterable[Sequence[str]]) -> int:
    """How many words of sentences get a vector, each time that they occur."""
    counts = Counter(word.lower() for words in sentences for word in words)
    return sum(n for n in counts.values() if n >= FLOOR)


def steps_of(places: int, epochs: int) -> int:
    """Steps for so many words: whole scans."""
    steps = max(-(-places * epochs // BATCH), 1)
    return steps if steps <= SCANNED else -(-steps // SCANNED) * SCANNED


def _optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.linear_schedule(rate, 0.0, steps))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _steps(window: int, rate: float, steps: int, state, stream, centres, keep, drawn, key):
    """Several steps; centres int32[some, B] are places in the stream."""
    optimizer = _optimizer(rate, steps)
    offsets = jnp.array([o for o in range(-window, window + 1) if o])

    def loss_of(params, centres, key):
        size, left, right, negative = jax.random.split(key, 4)
        centre, context = stream[centres], stream[centres[:, None] + offsets]
        reach = jax.random.randint(size, centre.shape, 1, window + 1)
        pairs = (context >= 0) & (jnp.abs(offsets) <= reach[:, None])
        pairs &= jax.random.uniform(left, context.shape) < keep[context]
        pairs &= (jax.random.uniform(right, centre.shape) < keep[centre])[:, None]
        v = params["in"][centre]
        positive = jax.nn.softplus(-jnp.einsum("bd,bcd->bc", v, params["out"][context]))
        others = jnp.searchsorted(drawn, jax.random.uniform(negative, (SHARED,)))
        negative = jax.nn.softplus(v @ params["out"][others].T).mean(1) * NEGATIVES
        weight = pairs.sum(1)
        return (jnp.where(pairs, positive, 0).sum() + (weight * negative).sum()) / jnp.maximum(weight.sum(), 1)

    def step(state, sliced):
        params, opt = state
        updates, opt = optimizer.update(jax.grad(loss_of)(params, *sliced), opt, params)
        return (optax.apply_updates(params, updates), opt), None

    return jax.lax.scan(step, state, (centres, jax.random.split(key, len(centres))))[0]
