"""The noise at t = 0, drawn straight in embedding space (2602.16813; 2602.12233 for the simplex prior).

A prior is a law of x0 in R^V for every token. The network sees x0 only through z0 = x0 @ E, so that is all we draw:

    gaussian     x0 ~ N(0, I_V)   =>   z0 ~ N(0, G),  G = E^T E
    dirichlet    x0 ~ Dir(1)      =>   z0 = sum_v e_v E_v / sum_v e_v,  e_v ~ Exp(1), summed chunk by chunk over V

Both are exact, in law and in the expected gradient with respect to E; nothing of shape (batch, length, V) is kept.
Noise of one example depends on that example's key alone, so it is the same on every mesh and in every microbatch.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.scipy.linalg import cho_solve, solve_triangular

# TPUs round float32 products to bf16 and GPUs to TF32: at a condition number of 1e5 the weakest direction of the
# noise would be wrong a hundredfold.
HIGHEST = jax.lax.Precision.HIGHEST


class Geometry(NamedTuple):
    """The linear map x -> z = x @ E in coordinates where the Gaussian noise is white; R = min(V, D).

    Attributes:
      color: [R, D]. xi @ color ~ N(0, G) for xi ~ N(0, I_R).
      whiten: [D, R]. Noise z0 @ whiten is N(0, I_R), and whiten @ whiten^T is the (pseudo-)inverse of G.
      codes: [V, R]. The tokens there, E @ whiten; the identity where V < D.
    """

    color: jax.Array
    whiten: jax.Array
    codes: jax.Array


def _cholesky(gram: jax.Array) -> jax.Array:
    size = gram.shape[0]
    jitter = 1e-6 * jnp.trace(gram) / size
    return jnp.linalg.cholesky(gram + jitter * jnp.eye(size, dtype=gram.dtype))


def geometry(embedding: jax.Array) -> Geometry:
    """Whitening of the embedding [V, D], in float32 and without a gradient (never differentiate a Cholesky factor)."""
    embedding = stop_gradient(embedding).astype(jnp.float32)
    vocab, width = embedding.shape
    if vocab < width:  # G is singular, but x itself can be recovered: x = z E^T (E E^T)^-1
        factor = _cholesky(jnp.matmul(embedding, embedding.T, precision=HIGHEST))
        whiten = cho_solve((factor, True), embedding).T
        return Geometry(embedding, whiten, jnp.eye(vocab, dtype=jnp.float32))
    factor = _cholesky(jnp.matmul(embedding.T, embedding, precision=HIGHEST))
    whiten = solve_triangular(factor, jnp.eye(width, dtype=jnp.float32), lower=True).T
    return Geometry(factor.T, whiten, jnp.matmul(embedding, whiten, precision=HIGHEST))


def _white(keys: jax.Array, length: int, size: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(key, (length, size)))(keys)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _colored(keys: jax.Array, length: int, color: jax.Array, carrier: jax.Array) -> jax.Array:
    """xi @ color [B, L, D] with the gradient of xi @ carrier, both [R, D]; xi is drawn again in the backward pass."""
    return jnp.matmul(_white(keys, length, color.shape[0]), color, precision=HIGHEST)


def _colored_forward(keys, length, color, carrier):
    return _colored(keys, length, color, carrier), (keys, color)


def _colored_backward(length, kept, gradient):
    keys, color = kept
    xi = _white(keys, length, color.shape[0])
    return None, jnp.zeros_like(color), jnp.einsum("blr,bld->rd", xi, gradient)


_colored.defvjp(_colored_forward, _colored_backward)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """x0 ~ N(0, I_V): the paper's prior."""

    name = "gaussian"

    def mean(self, embedding: jax.Array) -> jax.Array:
        """The mean of z0: [D]."""
        return jnp.zeros(embedding.shape[1])

    def sample(self, keys: jax.Array, embedding: jax.Array, length: int) -> jax.Array:
        """Draws z0 [B, L, D] ~ N(0, G), one row for each of the B keys.

        The value is xi @ color. Its gradient is that of E[x0 | xi] @ E, the mean of the dense draw's gradient given
        the noise that the network sees: unbiased, and less noisy than the dense draw's (Rao-Blackwell).
        """
        embedding = embedding.astype(jnp.float32)
        fixed = stop_gradient(embedding)
        if embedding.shape[0] < embedding.shape[1]:
            return _colored(keys, length, fixed, embedding)
        # The carrier equals codes^T @ E of `geometry`. It is computed from the D x D Gram matrix, because the codes are V x D.
        gram = jnp.matmul(fixed.T, embedding, precision=HIGHEST)
        factor = _cholesky(stop_gradient(gram))
        return _colored(keys, length, factor.T, solve_triangular(factor, gram, lower=True))

    def draw(self, keys: jax.Array, embedding: jax.Array, geo: Geometry, length: int) -> jax.Array:
        """The value of `sample` without its gradient, for geo = geometry(embedding) that is at hand."""
        return jnp.matmul(_white(keys, length, geo.color.shape[0]), geo.color, precision=HIGHEST)

    def sample_joint(self, keys: jax.Array, embedding: jax.Array, length: int) -> jax.Array:
        """`sample` for two embeddings side by side, of shape [V, 2D], which are equal when a student starts at its teacher.

        Their Gram matrix is then singular; a QR factor, slower on accelerators, is exact all the same.
        """
        codes, color = jnp.linalg.qr(stop_gradient(embedding).astype(jnp.float32))
        carrier = jnp.matmul(codes.T, embedding.astype(jnp.float32), precision=HIGHEST)
        return _colored(keys, length, color, carrier)


@dataclasses.dataclass(frozen=True)
class Dirichlet:
    """x0 uniform on the simplex, Dir(1): the interpolant then never leaves it."""

    name = "dirichlet"
    chunk: int = 1024  # vocabulary entries at a time

    def mean(self, embedding: jax.Array) -> jax.Array:
        """The mean of z0: [D]."""
        return embedding.mean(0)

    def sample(self, keys: jax.Array, embedding: jax.Array, length: int) -> jax.Array:
        """Draws z0 [B, L, D] = x0 @ E, x0 ~ Dir(1), one row for each of the B keys."""
        vocab, width = embedding.shape
        chunk = min(self.chunk, vocab)
        chunks = -(-vocab // chunk)
        padded = jnp.pad(embedding.astype(jnp.float32), ((0, chunks * chunk - vocab), (0, 0)))
        real = (jnp.arange(chunks * chunk) < vocab).astype(jnp.float32).reshape(chunks, chunk)

        @jax.checkpoint
        def add(carry, part):
            weighted, total = carry
            index, rows, mask = part
            draw = jax.vmap(lambda key: jax.random.exponential(jax.random.fold_in(key, index), (length, chunk)))
            draws = draw(keys) * mask
            return (weighted + draws @ rows, total + draws.sum(-1, keepdims=True)), None

        batch = keys.shape[0]
        zero = (jnp.zeros((batch, length, width)), jnp.zeros((batch, length, 1)))
        parts = (jnp.arange(chunks), padded.reshape(chunks, chunk, width), real)
        (weighted, total), _ = jax.lax.scan(add, zero, parts)
        return weighted / total

    def draw(self, keys: jax.Array, embedding: jax.Array, geo: Geometry, length: int) -> jax.Array:
        """Draws as `sample` does, which needs no geometry."""
        return self.sample(keys, embedding, length)

    sample_joint = sample


PRIORS = {"gaussian": Gaussian, "dirichlet": Dirichlet}
