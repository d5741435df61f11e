"""What is new is added in one place: a family with its settings is a class and a line, a target one record. Here from outside."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from toy import FIELDS, drawn, network

from flowlm.config import check_settings, declared, defaults
from flowlm.engine.build import build
from flowlm.maths import vocab
from flowlm.maths.identities import Match
from flowlm.objectives import FAMILIES
from flowlm.objectives.base import Auxiliary, Family, Teacher
from flowlm.objectives.targets import TARGETS, Target
from flowlm.system.settings import setting


@dataclasses.dataclass(frozen=True)
class Unigram(Family):
    """Learns every token by itself, from a state that shows none of them."""

    smoothing: float = setting(0.25, "share of the uniform law in what is learnt", "[0, 1)")
    kind: str = setting("soft", "soft, or hard", choices=("hard", "soft"))

    def draw(self, key, num):
        return {}

    def loss(self, net, params, aux, batch, keys):
        ids = batch["ids"]
        hidden = net.apply(params, jnp.zeros((*ids.shape, net.width)), jnp.zeros(ids.shape[0]), keys=keys)
        nats = vocab.cross_entropy(net.head(params), hidden, ids).mean(-1)
        return {"unigram": (1 - self.smoothing) * nats}, {}


def settings():
    config = defaults("unigram")
    config.model.update({**FIELDS, "vocab_size": 12})
    config.data.length = 6
    return config


def test_a_family_is_a_class_and_a_line(monkeypatch):
    monkeypatch.setitem(FAMILIES, "unigram", Unigram)
    config = settings()
    assert config.objective.smoothing == 0.25
    assert declared("unigram")["objective.smoothing"].doc == "share of the uniform law in what is learnt"
    config.objective.smoothing = 1.0
    with pytest.raises(ValueError, match=r"objective.smoothing must be in \[0, 1\), got 1.0"):
        check_settings(config)
    config.objective.update(smoothing=0.5, kind="softly")
    with pytest.raises(ValueError, match=r"unknown objective.kind 'softly': choose one of \['hard', 'soft'\]"):
        build(config, 12)
    config.objective.kind = "hard"
    experiment = build(config, 12)
    net, family = experiment.net, experiment.family
    assert (family.samplers(), family.likelihoods(), family.group, family.continuous) == ({}, {}, 1, False)
    # Muted logits are all zero, and so the loss is half of log 12.
    batch = {"ids": jnp.zeros((4, 6), jnp.int32), **family.draw(jax.random.key(0), 4)}
    losses, _ = jax.jit(lambda params: family.loss(net, params, None, batch, None))(net.mute(drawn(net)))
    assert losses["unigram"].tolist() == pytest.approx([0.5 * math.log(12.0)] * 4, rel=1e-6)


def test_a_target_is_one_record(monkeypatch):
    """One that only asks the student to be its teacher at the start of the jump; it says itself that it follows one."""

    def match(logits, teacher):
        p = jax.nn.softmax(teacher)
        loss = -jnp.sum(p * jax.nn.log_softmax(logits), -1)
        return Match(loss, loss, jnp.zeros_like(loss))

    def target(family, nets, z, rows, keys):
        live = nets.live.see(z, rows["tau_s"], rows["tau_t"], keys)
        return vocab.over_logits(match, (live, nets.flow.see(z, rows["tau_s"], rows["tau_s"])))

    monkeypatch.setitem(TARGETS, "copy", Target(target, follows=True))
    config = defaults("flow_map")
    config.model.update({**FIELDS, "vocab_size": 12, "time_embeddings": 2, "input": "both"})
    config.data.length, config.objective.target = 6, "copy"
    with pytest.raises(ValueError, match="objective.target copy follows a teacher"):
        build(config, 12)
    config.teacher = "its run directory"
    family = build(config, 12).family
    assert not family.differentiates
    net = network(time_embeddings=2, input="both")
    params = drawn(net)
    batch = {"ids": jnp.zeros((4, 6), jnp.int32), **family.draw(jax.random.key(0), 4)}
    silent = net.mute(params)
    aux = Auxiliary(Teacher(silent), silent)
    losses, _ = jax.jit(lambda params: family.loss(net, params, aux, batch, None))(silent)
    # Both laws are uniform over 12 tokens.
    assert losses["copy"].shape == (2,)
    assert losses["copy"].tolist() == pytest.approx([math.log(12.0)] * 2, rel=1e-6)
