"""The exact optimum on a finite data law, as a Network: no training, no parameters but the embedding.

    p(k | z_t) = softmax_k( log w_k + sum_l [ t w_l.e_{y_l} / (1-t)^2 - t^2 |e_{y_l}|^2 / (2 (1-t)^2) ] )
    D_t = sum_k p(k | z_t) one_hot(y^k)

with w = z @ whiten, e = E @ whiten: written here with a pseudo-inverse in numpy float64, independent of flowlm.maths.prior.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from toy import FunctionNetwork

from flowlm.maths.time_warp import TimeWarp


def correlated_law(vocab: int, length: int, num: int, seed: int):
    """(sequences [K, L], weights [K]): a random finite law whose positions depend on each other."""
    rng = np.random.default_rng(seed)
    everything = np.array(list(itertools.product(range(vocab), repeat=length)))
    sequences = everything[rng.choice(len(everything), num, replace=False)]
    return sequences, rng.dirichlet(np.full(num, 3.0))


def log_prob_head(hidden):
    return hidden


def oracle(
    sequences: np.ndarray, weights: np.ndarray, embedding: np.ndarray, warp: TimeWarp, tilt=None
) -> tuple[FunctionNetwork, dict]:
    """(net, params): net's logits are log D_t(z_t) + tilt [V], the optimum at tilt = 0; also where tokens are given."""
    vocab, width = embedding.shape
    length = sequences.shape[1]
    exact = np.asarray(embedding, np.float64)
    inverse = np.linalg.pinv(exact)  # [D, V]; x = z @ inverse where V <= D
    norms = jnp.asarray(np.diag(exact @ inverse), jnp.float32)  # |e_v|^2
    inverse = jnp.asarray(inverse, jnp.float32)
    sequences, log_weights = jnp.asarray(sequences), jnp.log(jnp.asarray(weights))
    tilt = jnp.zeros(vocab) if tilt is None else jnp.asarray(tilt)

    def apply(params, z, tau_s, tau_t=None, keys=None):
        t = warp.t(tau_s)[:, None, None]
        scores = jnp.matmul(z, inverse, precision="highest")  # [B, L, V]
        x = jnp.take_along_axis(scores[:, None], sequences[None, :, :, None], -1)[..., 0]  # [B, K, L]
        terms = (t * x - t**2 / 2 * norms[sequences]) / (1 - t) ** 2
        if "known" in params:  # as what is given is shown: the clean token, whatever the time is
            near = jnp.argmin(jnp.sum((z[:, :, None] - params["embedding"]) ** 2, -1), -1)
            terms = jnp.where(params["known"][:, None], jnp.where(sequences == near[:, None], 0, -1e9), terms)
        posterior = jax.nn.softmax(log_weights + terms.sum(-1))
        one_hot = jax.nn.one_hot(sequences, vocab)
        return jnp.log(jnp.einsum("bk,klv->blv", posterior, one_hot) + 1e-30) + tilt

    params = {"embedding": jnp.asarray(embedding, jnp.float32)}
    return FunctionNetwork(apply, lambda params: Partial(log_prob_head), vocab, length, width), params


def entropy(weights) -> float:
    return float(-(weights * np.log(weights)).sum())


def total_variation(ids: np.ndarray, sequences: np.ndarray, weights: np.ndarray) -> float:
    """Distance between the empirical law of ids [N, L] and the finite law."""
    index = {tuple(s): k for k, s in enumerate(sequences)}
    counts = np.zeros(len(sequences))
    outside = 0
    for row in np.asarray(ids):
        k = index.get(tuple(row))
        if k is None:
            outside += 1
        else:
            counts[k] += 1
    return float((np.abs(counts / len(ids) - weights).sum() + outside / len(ids)) / 2)
