"""Every operation over the vocabulary axis, one chunk of tokens at a time.

Logits have shape (batch, length, V): at V = 50,000 they dwarf everything else in a training step. Here they exist for one
chunk of positions at a time; the backward pass recomputes them, so nothing of that shape outlives its chunk. Every function
takes a `head`, a pytree (`jax.tree_util.Partial`) that maps hidden states [..., F] to float32 logits [..., V], and
hidden states [B, L, F]. Chunks are `span` positions of the length (None: by the rule below), so a batch sharded over
devices stays sharded.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Head = Callable[[jax.Array], jax.Array]
Readout = tuple[Head, jax.Array]  # what gives logits: a head and the hidden states that it reads
MovingReadout = tuple[Head, jax.Array, jax.Array]  # the same with the derivative of the hidden states

# Logits that are small enough to be held at once, 16 MB of float32; larger ones are cut into at least PARTS chunks (more
# would save little) of at most CHUNK tokens. In a training step these are one device's own (sharding.py).
SMALL = 2**22
PARTS = 8
CHUNK = 1024


# The name of an axis that jax.vmap maps over rows, which the shapes of a batch inside of it do not show.
MAPPED = "mapped_rows"


def _mapped() -> int:
    try:
        return jax.lax.axis_size(MAPPED)
    except NameError:  # because nothing is mapped so
        return 1


def _span(batch: int, length: int, size: int) -> int:
    """Positions of the length axis in one chunk, for `size` logits a token. A batch that is a symbol (jax.export) counts as 1."""
    batch = batch * _mapped() if isinstance(batch, int) else 1
    if batch * length * size <= SMALL:
        return length
    return max(1, min(CHUNK // batch, -(-length // PARTS)))


def _by_chunk(fn: Callable, head: Head | int, arrays: tuple, span: int | None) -> Any:
    """fn(*arrays) over chunks of `span` positions along axis 1 of every array; results are joined again.

    `head`, or V where there is none, says how large a chunk's logits are. One chunk is computed directly. Of several, each
    is recomputed in the backward pass.
    """
    batch, length = arrays[0].shape[:2]
    if span is None:
        size = head if isinstance(head, int) else jax.eval_shape(head, arrays[0][:1, :1]).shape[-1]
        span = _span(batch, length, size)
    if span >= length:
        return fn(*arrays)
    count = -(-length // span)

    def split(a):
        a = jnp.pad(a, ((0, 0), (0, count * span - length)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(batch, count, span, *a.shape[2:]), 1, 0)

    def join(a):
        return jnp.moveaxis(a, 0, 1).reshape(batch, count * span, *a.shape[3:])[:, :length]

    body = jax.checkpoint(lambda _, part: (None, fn(*part)), prevent_cse=False)
    _, out = jax.lax.scan(body, None, tuple(split(a) for a in arrays))
    return jax.tree.map(join, out)


def over_logits(fn: Callable, readouts: tuple, arrays: tuple = (), span: int | None = None) -> Any:
    """fn(*logits, *arrays) token by token, for formulas that need several networks' logits at once.

    Args:
      fn: maps logits [..., V] and arrays [...] of a chunk to a pytree of arrays [...] without a vocabulary axis.
      readouts: (head, hidden [B, L, F]) gives fn the logits; (head, hidden, tangent [B, L, F]) gives it the pair
        (logits, their derivative along the tangent of the hidden state).
      arrays: [B, L, ...], or [B] which is the same for every token of a row.
    """
    heads = [r[0] for r in readouts]
    batch, length = readouts[0][1].shape[:2]
    spread = [jnp.broadcast_to(a[:, None], (batch, length)) if a.ndim == 1 else a for a in arrays]
    sizes = [len(r) - 1 for r in readouts]
    flat = [a for r in readouts for a in r[1:]]

    def chunk(*parts):
        parts, logits = list(parts), []
        for head, size in zip(heads, sizes, strict=True):
            hidden = [parts.pop(0) for _ in range(size)]
            logits.append(head(hidden[0]) if size == 1 else jax.jvp(head, (hidden[0],), (hidden[1],)))
        return fn(*logits, *parts)

    return _by_chunk(chunk, heads[0], (*flat, *spread), span)


def cross_entropy(head: Head, hidden: jax.Array, ids: jax.Array, span: int | None = None) -> jax.Array:
    """-log softmax(logits)[ids]: nats [B, L] for ids [B, L]."""

    def nats(h, y):
        logits = head(h)
        return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, y[..., None], -1)[..., 0]

    return _by_chunk(nats, head, (hidden, ids), span)


def squared_error(head: Head, hidden: jax.Array, ids: jax.Array, span: int | None = None) -> jax.Array:
    """|softmax(logits) - one_hot(ids)|^2 = 1 - 2 p[ids] + |p|^2: [B, L]."""

    def error(h, y):
        p = jax.nn.softmax(head(h))
        return 1 - 2 * jnp.take_along_axis(p, y[..., None], -1)[..., 0] + jnp.sum(p * p, -1)

    return _by_chunk(error, head, (hidden, ids), span)


def softmax_embed(head: Head, hidden: jax.Array, embedding: jax.Array, span: int | None = None) -> jax.Array:
    """softmax(logits) @ E: the mean embedding [B, L, D] under the predicted distribution."""
    embedding = embedding.astype(jnp.float32)
    return _by_chunk(lambda h: jax.nn.softmax(head(h)) @ embedding, head, (hidden,), span)


def argmax(head: Head, hidden: jax.Array, span: int | None = None) -> jax.Array:
    """The likeliest token, ids [B, L]."""
    return _by_chunk(lambda h: jnp.argmax(head(h), -1).astype(jnp.int32), head, (hidden,), span)


def tempered(logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """logits [..., V] / temperature; at 0 its limit, which leaves the likeliest token alone. It may be traced."""
    traced = isinstance(temperature, jax.Array)
    if not traced and temperature > 0:
        return logits / temperature
    likeliest = jnp.argmax(logits, -1, keepdims=True) == jnp.arange(logits.shape[-1])
    limit = jnp.where(likeliest, 0.0, -jnp.inf)
    return jnp.where(temperature > 0, logits / jnp.where(temperature > 0, temperature, 1.0), limit) if traced else limit


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """logits [..., V] with all but the likeliest tokens that together hold `top_p` of the probability at -inf."""
    if top_p >= 1:  # a rounded sum may reach 1 before the tail is in it
        return logits
    order = jnp.sort(logits, -1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(order), -1) - jax.nn.softmax(order)
    least = jnp.min(jnp.where(before < top_p, order, jnp.inf), -1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def sparsemax(x: jax.Array) -> jax.Array:
    """The point of the probability simplex nearest to x [..., V] (1602.02068): max(x - threshold, 0), sums to 1.

    The threshold lies in [max x - 1, max x) and is found by bisection: sums over V alone, no sort, so V may be sharded.
    """
    low = jnp.max(x, -1, keepdims=True) - 1

    def halve(i, low):
        middle = low + 0.5 ** (i + 1)
        return jnp.where(jnp.sum(jnp.maximum(x - middle, 0), -1, keepdims=True) > 1, middle, low)

    low = jax.lax.fori_loop(0, 25, halve, low)
    # The support is settled; on it the threshold has a closed form.
    support = x > low
    size = jnp.maximum(jnp.sum(support, -1, keepdims=True), 1)
    threshold = (jnp.sum(jnp.where(support, x, 0), -1, keepdims=True) - 1) / size
    return jnp.maximum(x - threshold, 0)


def categorical(
    head: Head,
    hidden: jax.Array,
    key: jax.Array,
    temperature: float = 1.0,
    top_p: float = 1.0,
    kernel: Callable | None = None,
    arrays: tuple = (),
    span: int | None = None,
) -> jax.Array:
    """A draw from softmax(kernel(logits / temperature, *arrays)), ids [B, L]; `top_p` < 1 leaves out the least likely tokens.

    At temperature 0 the likeliest token of the logits takes all their probability; without a kernel it is what is drawn.

    The Gumbel noise has an exact tail (`mode="high"`): plain float32 draws cut it off, which quietly lowers the
    temperature of whatever is sampled with them.

    Args:
      key: one, or one for each row, [B]; a row's draw depends on its own key alone, not on chunks.
      arrays: [B, L], handed to the kernel chunk by chunk.
    """
    if kernel is None and not isinstance(temperature, jax.Array) and temperature == 0:
        return argmax(head, hidden, span)

    def gumbel(key, logits):
        return jax.random.categorical(key, logits, mode="high").astype(jnp.int32)

    def draw(h, position, *parts):
        logits = tempered(head(h), temperature)
        logits = nucleus(logits if kernel is None else kernel(logits, *parts), top_p)
        each = jax.vmap(lambda key, row, at: jax.vmap(gumbel)(jax.vmap(jax.random.fold_in, (None, 0))(key, at), row))
        return each(keys, logits, position)

    keys = jax.random.split(key, hidden.shape[0]) if key.ndim == 0 else key
    position = jnp.broadcast_to(jnp.arange(hidden.shape[1]), hidden.shape[:2])
    return _by_chunk(draw, head, (hidden, position, *arrays), span)


def gaussian_latents(
    keys: jax.Array,
    ids: jax.Array,
    embedding: jax.Array,
    times: tuple[jax.Array, ...],
    temperature: float | None = None,
    span: int | None = None,
) -> list[jax.Array]:
    """What is seen of w = (t one_hot(ids) + (1 - t) eps) / sqrt(t^2 + (1 - t)^2), eps ~ N(0, I_V) the same at every time.

    Args:
      keys: [B], one for each row.
      ids: [B, L].
      embedding: [V, D].
      times: t [B] each.

    Returns:
      for each time argmax w, ids [B, L]; with a temperature softmax(w / temperature) @ E, [B, L, D].
    """
    size = embedding.shape[0]

    def see(y, position):
        def row(key, at):
            return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (size,)))(at)

        eps, clean = jax.vmap(row)(keys, position), jax.nn.one_hot(y, size)
        out = []
        for t in times:
            t = t[:, None, None]
            w = (t * clean + (1 - t) * eps) / jnp.sqrt(t**2 + (1 - t) ** 2)
            soft = None if temperature is None else jax.nn.softmax(w / temperature) @ embedding
            out.append(jnp.argmax(w, -1).astype(jnp.int32) if soft is None else soft)
        return out

    return _by_chunk(see, size, (ids, jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)), span)
