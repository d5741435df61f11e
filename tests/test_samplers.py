"""What all samplers promise: independent draws, and no draw that nothing is made of."""

import dataclasses

import jax
import numpy as np
import pytest
from toy import drawn, overriding, run_config

from flowlm.engine import build as assembly
from flowlm.engine.sampling import named_sampler
from flowlm.maths.prior import Gaussian
from flowlm.objectives.autoregressive import Autoregressive
from flowlm.objectives.guidance import Prediction

NUM, STEPS = 3, 4


def built(family, **objective):
    """(net, family, params) of one block and rows of six tokens with these settings of the sampler."""
    changes = {f"objective.{key}": value for key, value in objective.items()}
    config = run_config(
        "",
        family,
        **{"model.blocks": 1, "model.learned_positions": True, "model.logit_cap": 0.0, "data.length": 6},
        **changes,
    )
    made = assembly.build(config, config.model.vocab_size)
    return made.net, made.family, drawn(made.net, scale=0.3)


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "objective", "names"),
    [
        ("flow", {"eta": 1.0}, ["euler", "ancestral"]),
        ("flow", {"eta": 1.0, "temperature": 0.55, "noise_scale": 0.8}, ["euler", "ancestral-temp0.55-noise0.8"]),
        ("flow", {"eta": 0.5, "noise_scale": 0.25}, ["euler", "eta0.5-noise0.25"]),
        ("flow", {"eta": 0.0, "temperature": 1.0}, ["euler", "euler-temp1"]),
        ("flow_map", {"noise_scale": 0.4}, ["map", "map-noise0.4"]),
        ("flow_map", {"noise_scale": 1.0}, ["map"]),
        ("masked", {}, ["ancestral"]),
        ("autoregressive", {}, ["draws"]),
    ],
)
def test_names_can_be_typed_and_each_names_its_sampler(family, objective, names):
    family = built(family, **objective)[1]
    choices = family.samplers()
    assert list(choices) == names
    assert all(named_sampler(family, name) == (name, choices[name]) for name in names)
    assert named_sampler(family) == (names[-1], choices[names[-1]])
    with pytest.raises(ValueError, match=f"no sampler 'm': there are {', '.join(names)}; did you mean "):
        named_sampler(family, "m")


def test_the_nearest_sampler_is_named():
    with pytest.raises(
        ValueError, match=r"no sampler 'map noise 0.4': there are map, map-noise0.4; did you mean map-noise0.4\?"
    ):
        named_sampler(built("flow_map", noise_scale=0.4)[1], "map noise 0.4")


# --- keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "objective"),
    [
        ("flow", {"eta": 1.0, "guidance": 2.0}),
        ("flow", {"eta": 1.0, "temperature": 0.7}),
        ("flow_map", {"gamma": 0.5, "guidance": 2.0, "temperature": 0.7}),
        ("flow_map", {"gamma": 0.5, "guidance": 2.0}),
    ],
    ids=str,
)
def test_noise_dropout_and_tokens_are_drawn_with_keys_of_their_own(family, objective, monkeypatch):
    """All keys that are drawn with in one call of a sampler, and those that they are made of, are different keys."""
    net, family, params = built(family, **objective)
    used = []

    def take(words):
        return used.extend(map(tuple, np.asarray(words).reshape(-1, 2).tolist()))

    def note(keys):
        return jax.debug.callback(take, jax.random.key_data(keys))

    fresh, draw = type(family).fresh, Prediction.draw

    def noted_fresh(self, net, params, key, *rest):
        note(key)
        note(jax.random.split(key, NUM))  # a row's noise
        return fresh(self, net, params, key, *rest)

    def noted_draw(self, key, *rest):
        note(key)
        note(jax.random.split(key, (NUM, net.length)))  # a token
        return draw(self, key, *rest)

    def noted_weak(params, z, tau_s, tau_t, keys):
        note(keys)
        for layer in range(2):  # dropout behind attention and behind the MLP
            note(jax.vmap(jax.random.fold_in, (0, None))(keys, layer))
        return net.weak(params, z, tau_s, tau_t, keys)

    monkeypatch.setattr(type(family), "fresh", noted_fresh)
    monkeypatch.setattr(Prediction, "draw", noted_draw)
    noted = overriding(net, weak=noted_weak)
    jax.jit(lambda key: family.sample(noted, params, key, NUM, STEPS))(jax.random.key(0)).block_until_ready()
    jax.effects_barrier()
    tokens = {"flow": STEPS - 1, "flowmap": 1}[type(family).__name__.lower()] * (family.temperature is not None)
    dropout = STEPS * (family.guidance != 1)
    assert len(used) == STEPS * (1 + NUM) + tokens * (1 + NUM * net.length) + dropout * 3 * NUM
    assert len(set(used)) == len(used)


# --- noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "objective", "draws"),
    [
        ("flow", {"eta": 0.0}, 1),
        ("flow", {"eta": 0.3}, 2),
        ("flow_map", {"gamma": 0.0}, 1),
        ("flow_map", {"gamma": 0.3}, 2),
    ],
    ids=str,
)
def test_noise_is_drawn_only_where_a_step_takes_it(family, objective, draws, monkeypatch):
    """At the start always; in the program of a step, which is traced once, only where the step takes noise."""
    net, family, params = built(family, **objective)
    drawn_noise, draw = [], Gaussian.draw

    def counted(self, *arguments):
        drawn_noise.append(arguments)
        return draw(self, *arguments)

    monkeypatch.setattr(Gaussian, "draw", counted)
    jax.eval_shape(lambda key: family.sample(net, params, key, NUM, STEPS), jax.random.key(0))
    assert len(drawn_noise) == draws


# --- temperature 0 -----------------------------------------------------------------------------------------------

LIMIT = 1e-6  # of a temperature that goes to 0


@pytest.mark.parametrize(
    ("family", "objective"),
    [
        ("flow", {}),
        ("flow_map", {}),
        ("flow_map", {"guidance": 2.0}),
        ("autoregressive", {}),
        ("masked", {}),
        ("uniform", {}),
    ],
    ids=str,
)
def test_temperature_0_is_the_limit_of_small_temperatures(family, objective):
    net, family, params = built(family, temperature=LIMIT, **objective)
    steps = net.length - 1 if isinstance(family, Autoregressive) else STEPS

    def draw(family):
        return jax.jit(lambda key: family.sample(net, params, key, 8, steps))(jax.random.key(1))

    limit = np.asarray(draw(family))
    assert len(np.unique(limit)) > 2
    np.testing.assert_array_equal(draw(dataclasses.replace(family, temperature=0.0)), limit)


def test_a_flow_map_at_temperature_0_decodes_the_likeliest_token():
    net, family, params = built("flow_map", temperature=0.0, top_p=0.5)
    likeliest = dataclasses.replace(family, temperature=None)

    def draw(family):
        return jax.jit(lambda key: family.sample(net, params, key, 8, STEPS))(jax.random.key(2))

    np.testing.assert_array_equal(draw(family), draw(likeliest))
