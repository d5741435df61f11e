"""The exact flow map on a finite data law, made without the identities that it is to test.

numpy, float64   dX/du = b_u(X) = (D_u(X) @ E - X) / (1 - u),
                 delta_{s,t} = int_s^t (1-s)(1-t) / ((t-s)(1-u)^2) D_u(X_{s,u}) du, by an adaptive solver
                 (dirichlet: D is constant between events, which are found exactly);
                 derivatives of delta by finite differences
jax, a Network   the same in r = u / (1 - u) and y = X / (1 - u), where dy/dr = D @ E and delta is the plain mean of D
                 over r: Runge-Kutta with a fixed number of steps, differentiable in everything
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from oracle import correlated_law
from scipy.integrate import solve_ivp
from toy import FunctionNetwork


def column(time):
    return np.asarray(time)[:, None, None]


class GaussianFlow:
    """A random law of `num` sequences; z [B, L, D], times [B], distributions [B, L, V]."""

    prior = "gaussian"
    step = 1e-3  # of differences, in units of r

    def __init__(self, vocab: int, width: int, length: int = 2, num: int = 5, seed: int = 0):
        self.sequences, self.weights = correlated_law(vocab, length, num, seed)
        self.one_hot = np.eye(vocab)[self.sequences]  # [K, L, V]
        self.embedding = np.random.default_rng(seed).standard_normal((vocab, width)) / np.sqrt(width)
        self.inverse = np.linalg.pinv(self.embedding)  # x = z @ inverse where V <= D
        self.norms = np.diag(self.embedding @ self.inverse)

    def state(self, rng, s):
        """z_s = ((1 - s) x0 + s x1) @ E."""
        tokens = self.one_hot[rng.choice(len(self.weights), len(s), p=self.weights)]
        return ((1 - column(s)) * self.noise(rng, tokens.shape) + column(s) * tokens) @ self.embedding

    def noise(self, rng, shape):
        return rng.standard_normal(shape)

    def denoiser(self, z, t):
        t = column(t)
        per_token = (t * (z @ self.inverse) - t**2 / 2 * self.norms) / (1 - t) ** 2
        score = np.log(self.weights) + np.einsum("blv,klv->bk", per_token, self.one_hot)
        p = np.exp(score - score.max(1, keepdims=True))
        return np.einsum("bk,klv->blv", p / p.sum(1, keepdims=True), self.one_hot)

    def velocity(self, z, t):
        return (self.denoiser(z, t) @ self.embedding - z) / (1 - column(t))

    def map(self, z, s, t):
        """(X_{s,t}(z), delta_{s,t}(z)); time runs as u = s + q (t - s), so that s = t is no exception."""
        split = z.size
        s, t = np.asarray(s, np.float64), np.asarray(t, np.float64)

        def rate(q, state):
            x, u = state[:split].reshape(z.shape), s + q * (t - s)
            weight = (1 - s) * (1 - t) / (1 - u) ** 2
            parts = column(t - s) * self.velocity(x, u), column(weight) * self.denoiser(x, u)
            return np.concatenate([a.ravel() for a in parts])

        shape = (*z.shape[:2], len(self.embedding))
        start = np.concatenate([z.ravel(), np.zeros(np.prod(shape))])
        end = solve_ivp(rate, (0, 1), start, "DOP853", rtol=1e-11, atol=1e-11).y[:, -1]
        return end[:split].reshape(z.shape), end[split:].reshape(shape)

    def delta(self, z, s, t):
        return self.map(z, s, t)[1]

    def d_dt(self, z, s, t):
        """d/dt delta_{s,t}(z)."""
        return _difference(lambda h: self.delta(z, s, t + h), self.step * (1 - t) ** 2)

    def d_flow(self, z, s, t):
        """(d/ds + b_s . grad) delta_{s,t}(z)."""
        b = self.velocity(z, s)
        return _difference(lambda h: self.delta(z + column(h) * b, s + h, t), self.step * (1 - s) ** 2)


def _difference(fn, h):
    """Fourth-order central difference of fn(offset [B]) at 0, step h [B]."""
    return (8 * (fn(h) - fn(-h)) - (fn(2 * h) - fn(-2 * h))) / (12 * column(h))


class DirichletFlow(GaussianFlow):
    """x0 uniform on the simplex, V <= D: p(k | x) = w_k prod_l 1[x_l[y^k_l] >= t], up to a constant."""

    prior = "dirichlet"
    step = 1e-5  # exact, but for a kink at every event

    def noise(self, rng, shape):
        return rng.dirichlet(np.ones(shape[-1]), shape[:-1])

    def denoiser(self, z, t):
        room = z @ self.inverse - column(t)
        alive = (np.einsum("blv,klv->bkl", room, self.one_hot) >= -1e-12).all(-1) * self.weights
        return np.einsum("bk,klv->blv", alive / alive.sum(1, keepdims=True), self.one_hot)

    def map(self, z, s, t):
        pairs = [self._one(*args) for args in zip(z @ self.inverse, s, t, strict=True)]
        x, delta = (np.stack(a) for a in zip(*pairs, strict=True))
        return x @ self.embedding, delta

    def _one(self, x, s, t):
        """In y = x / (1 - u), r = u / (1 - u): dy/dr = D, and a sequence dies when one of its tokens has y < r."""
        r, end = s / (1 - s), t / (1 - t)
        y, total, alive = x / (1 - s), 0.0, self.weights.copy()
        room = np.einsum("lv,klv->kl", y - r, self.one_hot).min(1)
        alive[room < -1e-12] = 0
        while True:
            d = np.einsum("k,klv->lv", alive / alive.sum(), self.one_hot)
            with np.errstate(divide="ignore", invalid="ignore"):
                wait = np.where((d > 0) & (d < 1 - 1e-12), (y - r) / (1 - d), np.inf)
            left = end - r
            step = min(left, wait.min())
            y, total, r = y + step * d, total + step * d, r + step
            if step == left:
                return y * (1 - t), d if t == s else total * (1 - s) * (1 - t) / (t - s)
            position, token = np.unravel_index(wait.argmin(), wait.shape)
            alive[self.sequences[:, position] == token] = 0


# Beyond this r = t / (1 - t) a denoiser is one-hot to float32.
LIMIT = 8.0


def _shift(tilt, hidden):
    return hidden + tilt


def parameters(embedding, tilt=0.0) -> dict:
    """What `network` needs for the embedding [V, D]; the tilt is added to its logits."""
    inverse = np.linalg.pinv(np.asarray(embedding, np.float64))
    arrays = {"embedding": embedding, "inverse": inverse, "norms": np.diag(embedding @ inverse)}
    arrays["tilt"] = np.broadcast_to(tilt, len(embedding))
    return {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}


def network(flow: GaussianFlow, warp, steps: int = 32) -> tuple[FunctionNetwork, dict]:
    """(net, params): net's logits are log delta_{s,t}(z) + tilt."""
    one_hot, log_weights = jnp.asarray(flow.one_hot, jnp.float32), jnp.log(jnp.asarray(flow.weights, jnp.float32))
    vocab, width = flow.embedding.shape
    dot = functools.partial(jnp.matmul, precision="highest")

    def apply(params, z, tau_s, tau_t=None, keys=None):
        s, t = (warp.t(tau)[:, None, None] for tau in (tau_s, tau_s if tau_t is None else tau_t))
        s = jnp.minimum(s, LIMIT / (1 + LIMIT))

        def denoiser(y, r):
            per_token = r * dot(y, params["inverse"]) - r**2 / 2 * params["norms"]
            score = log_weights + jnp.einsum("blv,klv->bk", per_token, one_hot, precision="highest")
            return jnp.einsum("bk,klv->blv", jax.nn.softmax(score), one_hot, precision="highest")

        start = s / (1 - s)
        end = jnp.maximum(t / jnp.maximum(1 - t, 1e-6), start)
        h = (jnp.minimum(end, LIMIT) - start) / steps

        def push(d):
            return dot(d, params["embedding"])

        def step(i, carry):
            y, total = carry
            r = start + i * h
            a = denoiser(y, r)
            b = denoiser(y + h / 2 * push(a), r + h / 2)
            c = denoiser(y + h / 2 * push(b), r + h / 2)
            d = denoiser(y + h * push(c), r + h)
            mean = (a + 2 * b + 2 * c + d) / 6
            return y + h * push(mean), total + mean / steps

        y, delta = jax.lax.fori_loop(0, steps, step, (z / (1 - s), jnp.zeros((*z.shape[:2], vocab))))
        inside = jnp.where(end > LIMIT, (LIMIT - start) / (end - start), 1.0)  # the rest of r has the last D
        delta = inside * delta + (1 - inside) * denoiser(y, jnp.minimum(end, LIMIT))
        return jnp.log(delta + 1e-30)

    def head(params):
        return Partial(_shift, params["tilt"])

    return FunctionNetwork(apply, head, vocab, flow.sequences.shape[1], width), parameters(flow.embedding)
