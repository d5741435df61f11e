"""A step on any mesh is the step on one device; so is every operation over a vocabulary that is cut into unequal parts."""

import functools
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from flowlm.config import defaults
from flowlm.engine.build import abstract_state, build
from flowlm.engine.sharding import Layout, make_layout, make_mesh
from flowlm.engine.state import init_state, make_step
from flowlm.maths import vocab
from flowlm.maths.prior import Dirichlet, Gaussian, geometry
from flowlm.objectives.base import Teacher

ROOT = Path(__file__).parents[1]
B, L, D, V = 16, 16, 32, 37  # a vocabulary that no mesh divides


def experiment(family, **changes):
    config = defaults(family)
    config.update(batch_size=B, ema_decay=0.9)
    config.data.length = L
    config.model.update(width=D, blocks=2, heads=4, cond=16, vocab_size=V, remat="full", dropout=0.1)
    if family == "flow_map":
        config.model.update(time_embeddings=2, input="both")
        config.teacher = "its run directory"
    config.update_from_flattened_dict(changes)
    return build(config, V), config


def step_of(made, config, layout):
    net, family, optimizer, _ = made
    settings = dict(seed=0, ema_decay=config.ema_decay, accumulation=config.accumulation, dropout=True)
    return make_step(net, family, optimizer, **settings, layout=layout)


def begin(made):
    """A state whose matrices are not zero: everything has a gradient."""
    net, family, optimizer, _ = made
    state = init_state(net, family, optimizer, 0)

    def noisy(path, a):
        return a + 0.1 * jax.random.normal(jax.random.key(len(jax.tree_util.keystr(path))), a.shape)

    params = jax.tree_util.tree_map_with_path(noisy, state.params)
    return state._replace(params=params, ema=params)


def two_steps(made, config, layout):
    """(metrics of two steps, parameters after them, the compiled step as text)."""
    ids = jax.random.randint(jax.random.key(1), (B, L), 0, V)
    step, places = step_of(made, config, layout), None
    if layout is not None:
        places = jax.tree.map(lambda a: a.sharding, abstract_state(made, layout))
        ids = jax.device_put(ids, layout.rows)
    state = jax.jit(lambda: begin(made), out_shardings=places)()
    teacher = Teacher(state.ema) if config.teacher else None
    compiled = jax.jit(step, out_shardings=(places, None)).lower(state, ids, teacher).compile()
    metrics = []
    for _ in range(2):
        state, values = compiled(state, ids, teacher)
        metrics.append({name: float(value) for name, value in values.items()})
    return metrics, jax.tree.map(np.asarray, state.params), compiled.as_text()


@functools.cache
def on_one_device(family, **changes):
    """(metrics, parameters) of two steps without a mesh."""
    return two_steps(*experiment(family, **changes), None)[:2]


CASES = {
    "fsdp": ("flow", {}, dict(), dict(fsdp=True)),
    "model": ("flow", {}, dict(model=4), dict()),
    "replica x data x model, fsdp": ("flow", {}, dict(replica=2, model=2), dict(fsdp=True)),
    "accumulated": (
        "flow_map",
        {"accumulation": 2, "objective.surgery": True},
        dict(replica=2, model=2),
        dict(fsdp=True),
    ),
    "derivative": ("flow_map", {"objective.target": "csd"}, dict(model=2), dict(fsdp=True)),
}


# Surgery over microbatches takes half a minute to compile; without it they are tested with distillation and masked diffusion.
SLOW = ("accumulated",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_a_sharded_step_is_the_step(name):
    family, changes, mesh, settings = CASES[name]
    made, config = experiment(family, **changes)
    metrics, params, text = two_steps(made, config, Layout(make_mesh(**mesh), **settings))
    expected, expected_params = on_one_device(family, **changes)
    for ours, theirs in zip(metrics, expected, strict=True):
        for key in theirs:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=2e-5, err_msg=key)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True):
        assert (
            np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-7
        )  # Adam divides by gradients that may be all rounding
    # Nothing with a vocabulary axis and a token axis travels: logits [rows, span, V] stay where they are.
    for shape in re.findall(r"= \w+\[([\d,]*)\]\S* all-(?:gather|to-all)(?:-start)?\(", text):
        sizes = [int(n) for n in shape.split(",") if n]
        assert not (len(sizes) == 3 and sizes[-1] in (V, -(-V // 2), -(-V // 4))), shape


def test_gradients_may_travel_in_bfloat16():
    """Half of the bits; the loss of the first step is the same, the update nearly."""
    made, config = experiment("flow")
    layout = Layout(make_mesh(), fsdp=True, grad_reduce_dtype="bfloat16")
    metrics, *_ = two_steps(made, config, layout)
    expected, _ = on_one_device("flow")
    np.testing.assert_allclose(metrics[0]["loss"], expected[0]["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["grad_norm"], expected[0]["grad_norm"], rtol=1e-2)
    assert abs(metrics[0]["grad_norm"] / expected[0]["grad_norm"] - 1) > 1e-7


def test_what_fsdp_splits():
    """All that is large is cut over `data`, in parameters, moving average and both moments."""
    config = runpy.run_path(str(ROOT / "experiments/lm1b.py"))["get_config"]()
    made = build(config, config.model.vocab_size)
    state = abstract_state(made, Layout(make_mesh(), fsdp=True))
    whole = sum(a.size for a in jax.tree.leaves(state))
    mine = sum(np.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(state))
    assert mine < 1.03 * whole / 8
    state = abstract_state(made, Layout(make_mesh(), fsdp=False))
    assert all(a.sharding.is_fully_replicated for a in jax.tree.leaves(state))


# --- a vocabulary in unequal parts -------------------------------------------------------------------------------


def affine(kernel, bias, hidden):
    return hidden @ kernel + bias


def arrays():
    keys = jax.random.split(jax.random.key(0), 6)
    return {
        "kernel": jax.random.normal(keys[0], (D, V)),
        "bias": jax.random.normal(keys[1], (V,)),
        "embedding": jax.random.normal(keys[2], (V, D)),
        "hidden": jax.random.normal(keys[3], (4, L, D)),
    }, {"ids": jax.random.randint(keys[4], (4, L), 0, V), "keys": jax.random.split(keys[5], 4)}


OPERATIONS = {
    "cross_entropy": lambda h, p, a: vocab.cross_entropy(h, p["hidden"], a["ids"], 4),
    "squared_error": lambda h, p, a: vocab.squared_error(h, p["hidden"], a["ids"], 4),
    "softmax_embed": lambda h, p, a: vocab.softmax_embed(h, p["hidden"], p["embedding"], 4),
    "sparsemax": lambda h, p, a: vocab.over_logits(lambda x: (vocab.sparsemax(x) ** 2).sum(-1), ((h, p["hidden"]),), (), 4),
    "derivative": lambda h, p, a: vocab.over_logits(
        lambda x, y: (jax.nn.softmax(x[0]) * x[1] * jax.nn.softmax(y)).sum(-1),
        ((h, 0.3 * p["hidden"], 0.1 * p["hidden"] ** 2), (h, 0.3 * jnp.sin(p["hidden"]))), (), 4,
    ),
    "argmax": lambda h, p, a: vocab.argmax(h, p["hidden"], 4),
    "categorical": lambda h, p, a: vocab.categorical(h, p["hidden"], a["keys"], 0.7, 0.9, span=4),
    "gaussian_latents": lambda h, p, a: vocab.gaussian_latents(
        a["keys"], a["ids"], p["embedding"], (jnp.full(4, 0.3),), 0.5, 4
    )[0],
    "embed": lambda h, p, a: p["embedding"][a["ids"]],
    "geometry": lambda h, p, a: geometry(p["embedding"]).whiten,
    "gaussian noise": lambda h, p, a: Gaussian().sample(a["keys"], p["embedding"], L),
    "dirichlet noise": lambda h, p, a: Dirichlet(chunk=8).sample(a["keys"], p["embedding"], L),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_over_a_sharded_vocabulary(name):
    layout, (params, rest) = Layout(make_mesh(model=4)), arrays()
    axes = {"kernel": P(None, "model"), "bias": P("model"), "embedding": P("model")}

    def run(params, shard):
        def of(params):
            if shard:

                def place(k, a):
                    return jax.lax.with_sharding_constraint(a, NamedSharding(layout.mesh, axes[k]))

                params = {k: place(k, a) if k in axes else a for k, a in params.items()}
            return OPERATIONS[name](Partial(affine, params["kernel"], params["bias"]), params, rest)

        out, pull = jax.vjp(of, params)
        return out, pull(jnp.cos(out)) if jnp.issubdtype(out.dtype, jnp.floating) else None

    ours, theirs = jax.jit(run, static_argnums=1)(params, True), jax.jit(run, static_argnums=1)(params, False)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


# --- what does not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (dict(model=3), "mesh.model = 3, but 8 devices are here, no multiple of 3"),
        (dict(replica=-1), "one of them may be -1"),
        (dict(data=4, model=4), "but 8 devices are here"),
        (dict(replica=0), "at least 1"),
    ],
)
def test_meshes_that_the_devices_do_not_make(mesh, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(**mesh)


def test_layouts_that_the_network_does_not_fit():
    config = defaults()
    config.mesh.model = 8
    config.model.heads = 4
    with pytest.raises(ValueError, match=r"mesh.model = 8 does not divide model.heads = 4"):
        make_layout(config)
    config.mesh.update(model=1, fsdp=True)
    config.model.width = 4 * 9
    with pytest.raises(ValueError, match=r"model.width = 36, which mesh.data = 8 does not divide: set mesh.data=4 and"):
        make_layout(config)
    config.mesh.update(model=1, fsdp=False, grad_reduce_dtype="float16")
    with pytest.raises(ValueError, match="float16"):
        make_layout(config)
