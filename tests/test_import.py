"""Checkpoints of the reference: each fixture computes what the reference did, and nothing but tensors is ever unpickled."""

import importlib.util
import os
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy import drawn, run_config

from flowlm.engine import sampling
from flowlm.engine.build import build
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.exchange import importing
from flowlm.exchange.export import export
from flowlm.models.reference import from_reference, to_reference
from flowlm.runs.trained import load_teacher, load_trained

pytestmark = pytest.mark.needs("torch")  # reads a .ckpt
if importlib.util.find_spec("torch") is not None:
    import torch

FIXTURES = Path(__file__).parent / "data" / "flm_reference"


def names_of(checkpoint):
    return [name for name in checkpoint["state_dict"] if "inv_freq" not in name]


def changed(tmp_path, name, change):
    """The path of a copy of a fixture, changed by `change`(its contents)."""
    held = torch.load(FIXTURES / f"{name}.ckpt", weights_only=True)
    change(held)
    torch.save(held, tmp_path / f"{name}.ckpt")
    return tmp_path / f"{name}.ckpt"


def timed(said):
    """As a change: what the settings say of time_conditioning."""
    return lambda held: held["hyper_parameters"]["config"]["algo"].update(time_conditioning=said)


@pytest.mark.parametrize("name", ["flm", "fmlm", "mdlm", "ar"])
def test_fixtures_compute_what_the_reference_did(name, tmp_path):
    path = changed(tmp_path, name, timed(False)) if name == "mdlm" else FIXTURES / f"{name}.ckpt"
    run = importing.import_run(path, tmp_path / "run", "ema", None)
    assert run.step == 1234
    run = load_trained(tmp_path / "run", Layout(make_mesh(data=1)))
    net, params, io = run.experiment.net, run.params, load_file(FIXTURES / f"{name}.io.safetensors")
    tau_s, tau_t = jnp.asarray(io.get("tau_s", np.zeros(3, np.float32))), io.get("tau_t")
    embedding, tokens = params["embedding"], run.config.model.vocab_size
    # Where there is a mask, it is the last of the reference's ids, and its own logit, which is never read, is not kept.
    assert len(embedding) == 61 and tokens == (60 if name == "mdlm" else 61)
    states = {"logits": embedding[io["ids"]]} if name == "ar" else {"logits": io["x"] @ embedding}
    if name != "ar":
        states["logits_from_ids"] = embedding[io["ids"]]
    for output, z in states.items():
        hidden = net.apply(params, z, tau_s, tau_t)
        uncapped = hidden @ params["unembed_kernel"] + params["unembed_bias"]
        np.testing.assert_allclose(uncapped, io[output][..., :tokens], atol=1e-4)
        logits = net.unembed(params, hidden)
        if name == "ar":
            np.testing.assert_allclose(logits, io["logits"], atol=1e-4)
        elif output == "logits":
            capped = io["log_probs_capped30"][..., :tokens]
            np.testing.assert_allclose(jax.nn.log_softmax(logits), jax.nn.log_softmax(capped), atol=1e-4)
    draw = sampling.Sampler(net, run.experiment.family, Layout(make_mesh(data=1)))
    ids = draw(params, jax.random.key(0), 4, 11)
    assert ids.shape == (4, 12) and ids.max() < tokens and len(np.unique(ids)) > 5


def test_mdlm_equals_the_reference_in_every_logit():
    """The mask's too, in the network that the arrays are of."""
    source = importing.read_ckpt(FIXTURES / "mdlm.ckpt", "ema")
    config = importing.load_imported(FIXTURES / "flm.ckpt").config  # the same sizes, no mask
    net, io = build(config, 61).net, load_file(FIXTURES / "mdlm.io.safetensors")
    params = from_reference(source.arrays, net, "mdlm.ckpt")
    hidden = net.apply(params, net.embed(params, jnp.asarray(io["x"])), jnp.asarray(io["tau_s"]))
    logits = jax.nn.log_softmax(net.unembed(params, hidden))
    np.testing.assert_allclose(hidden @ params["unembed_kernel"] + params["unembed_bias"], io["logits"], atol=1e-4)
    np.testing.assert_allclose(logits, io["log_probs_capped30"], atol=1e-4)


def test_settings_of_omegaconf_are_read_without_it(tmp_path):
    """hyper_parameters as Lightning keeps them, names as torch.compile leaves them; see the fixtures' README."""
    run = importing.load_imported(FIXTURES / "omegaconf.ckpt")
    assert (run.config.data.length, run.config.model.width, run.config.model.blocks, run.step) == (6, 16, 1, 70)


def at_the_top(held):
    """As MDLM's own code has it."""
    del held["hyper_parameters"]["config"]["algo"]["time_conditioning"]
    held["hyper_parameters"]["config"]["time_conditioning"] = True


@pytest.mark.parametrize(("name", "change"), [("mdlm", timed(True)), ("mdlm", at_the_top), ("flm", timed(False))])
def test_a_network_that_is_shown_another_time_is_refused(name, change, tmp_path):
    """Its logits depend on the time and would not here, or the other way round."""
    with pytest.raises(ValueError, match=r"says time_conditioning: (True|False), but the family '(masked|flow)' is"):
        importing.import_run(changed(tmp_path, name, change), tmp_path / "run", "ema", None)
    assert not (tmp_path / "run").exists()


def test_settings_that_do_not_say_are_read(tmp_path):
    path = changed(tmp_path, "mdlm", lambda held: held["hyper_parameters"]["config"]["algo"].pop("time_conditioning"))
    assert importing.load_imported(path).config.objective.family == "masked"


def same_params(ours, theirs):
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_forward_module.", "_forward_module.module.", "module._orig_mod.", "_fsdp_wrapped_module."],
)
def test_names_of_wrapped_networks(prefix, tmp_path):
    """As DDP, DeepSpeed, FSDP and torch.compile leave them, over the trainer's own."""

    def wrap(held):
        held["state_dict"] = {prefix + name: a for name, a in held["state_dict"].items()}

    for weights in ("ema", "live"):
        whole = importing.load_imported(FIXTURES / "flm.ckpt", weights).params
        assert same_params(importing.load_imported(changed(tmp_path, "flm", wrap), weights).params, whole)


def test_one_array_under_two_names_is_refused(tmp_path):
    name = "vocab_embed.embedding"

    def twice(held):
        return held["state_dict"].update({f"module.{name}": held["state_dict"][f"backbone.{name}"]})

    with pytest.raises(ValueError, match=f"has {name} twice, under different prefixes"):
        importing.load_imported(changed(tmp_path, "flm", twice), "live")


ROTARY = "backbone.rotary_emb.inv_freq"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_rounded_rotary_table_is_the_same_table(dtype, tmp_path):
    def rounded(held, factor=1.0):
        held["state_dict"][ROTARY] = (held["state_dict"][ROTARY] * factor).to(getattr(torch, dtype))

    whole = importing.load_imported(FIXTURES / "flm.ckpt").params
    assert same_params(importing.load_imported(changed(tmp_path, "flm", rounded)).params, whole)
    with pytest.raises(ValueError, match="other rotary frequencies"):
        importing.load_imported(changed(tmp_path, "flm", lambda held: rounded(held, 1.02)))


def test_a_rounded_rotary_table_in_safetensors(tmp_path):
    export(FIXTURES.parent / "run", tmp_path / "st", Layout(make_mesh(data=1)), format="safetensors")
    (tmp_path / "st/manifest.json").unlink()
    file = tmp_path / "st/model.safetensors"
    whole = importing.load_imported(file).params
    for factor in (1.0, 1.02):
        table = jnp.asarray(factor * 1e4 ** (-np.arange(4) / 4), jnp.bfloat16)
        save_file(load_file(file) | {"module.rotary_emb.inv_freq": np.asarray(table)}, file)
        if factor == 1.0:
            assert same_params(importing.load_imported(file).params, whole)
    with pytest.raises(ValueError, match="other rotary frequencies"):
        importing.load_imported(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_checkpoint_is_refused(value, tmp_path):
    """All of it, or one number of the averaged parameters."""

    def everywhere(held):
        for array in held["ema"]["shadow_params"]:
            array.fill_(value)

    def once(held):
        held["ema"]["shadow_params"][3].view(-1)[7] = value

    for change, count in ((everywhere, r"\d\d"), (once, "1")):
        with pytest.raises(ValueError, match=rf"numbers that are not finite in {count} of its \d\d arrays"):
            importing.import_run(changed(tmp_path, "flm", change), tmp_path / "run", "ema", None)
    assert not (tmp_path / "run").exists()
    assert importing.load_imported(tmp_path / "flm.ckpt", "live").step == 1234


def write(path, config, params, prefix="backbone.", live=0.0):
    """A checkpoint as the trainer of the reference writes it: the parameters are its average."""
    arrays = {name: torch.from_numpy(np.array(a)) for name, a in to_reference(params).items()}
    model, family = config.model, {v: k for k, v in importing.FAMILIES.items()}[config.objective.family]
    algo = {
        "name": family,
        "causal_attention": model.causal,
        "double_temb": model.time_embeddings == 2,
        "backbone": "dit",
    }
    sizes = {"hidden_size": model.width, "cond_dim": model.cond, "n_blocks": model.blocks, "n_heads": model.heads}
    held = {
        "state_dict": {prefix + name: a + live for name, a in arrays.items()},
        "ema": {"decay": 0.9999, "num_updates": 9, "shadow_params": list(arrays.values())},
        "hyper_parameters": {"config": {"algo": algo, "model": sizes | {"length": config.data.length, "dropout": 0.0}}},
        "global_step": 9,
    }
    torch.save(held, path)
    return held


@pytest.fixture
def reference_run(data_dir):
    """(settings, parameters) of a flow on the grammar that the reference could have trained."""
    bare = {"model.input": "raw", "model.gate_init": 0.0, "model.width": 16}
    config = run_config(data_dir, "flow", **bare)
    return config, drawn(build(config, 99, 98).net)


def test_an_imported_run_teaches(reference_run, tmp_path, data_dir):
    config, params = reference_run
    write(tmp_path / "it.ckpt", config, params, "_orig_mod.backbone.", live=1.0)
    importing.import_run(tmp_path / "it.ckpt", tmp_path / "run", "ema", config)
    run = load_trained(tmp_path / "run", Layout(make_mesh(data=1)))
    assert run.config.data == config.data and run.tokenizer.start == 98
    np.testing.assert_array_equal(run.params["blocks"]["qkv"]["kernel"], params["blocks"]["qkv"]["kernel"])
    live = importing.load_imported(tmp_path / "it.ckpt", "live", config).params
    np.testing.assert_array_equal(live["blocks"]["qkv"]["kernel"], params["blocks"]["qkv"]["kernel"] + np.float32(1))
    student = run_config(data_dir, "flow_map", teacher=str(tmp_path / "run"))
    student.model.update(input="raw", gate_init=0.0, width=16)
    experiment = build(student, 99, 98)
    taught = load_teacher(student, run.tokenizer, experiment, Layout(make_mesh(data=1))).flow
    z, tau = jax.random.normal(jax.random.key(1), (2, 19, 16)), jnp.array([0.1, 0.7])
    ours, theirs = run.experiment.net, experiment.net
    logits = theirs.unembed(taught, theirs.apply(taught, z, tau, tau))
    np.testing.assert_allclose(logits, ours.unembed(params, ours.apply(params, z, tau)), atol=1e-5)


def test_a_mask_among_the_tokens_moves_behind_them(tmp_path):
    """BERT's [MASK] is token 103: here it is one more, with the same embedding, and 103 is never written."""
    config = importing.load_imported(changed(tmp_path, "mdlm", timed(False))).config
    arrays = importing.read_ckpt(FIXTURES / "mdlm.ckpt", "ema").arrays
    moved = importing._mask_behind(arrays, 5)
    config.model.vocab_size = 61
    config.data.tokenizer = "none"
    net = build(config, 61).net
    params = from_reference(moved, net, "it")
    np.testing.assert_array_equal(params["embedding"][61], params["embedding"][5])
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)))
    state = net.embed(params, jnp.where(ids == 5, 61, ids))
    np.testing.assert_array_equal(state, arrays["vocab_embed.embedding"][ids])
    probabilities = jax.nn.softmax(net.unembed(params, net.apply(params, state, jnp.zeros(2))))
    assert probabilities[..., 5].max() < 1e-9


def broken(held, how):
    state, average = held["state_dict"], held["ema"]["shadow_params"]
    name = names_of(held)[7]
    if how == "missing":
        del state[name], average[7]
    elif how == "not known":
        state["backbone.more"] = torch.zeros(3)
        average.append(torch.zeros(3))
    elif how == "of another shape":
        state[name] = average[7] = torch.zeros(3, 5)
    elif how == "averaged arrays that do not go with":
        average[3], average[7] = average[7], average[3]
    elif how == "no averaged parameters":
        del held["ema"]
    elif how == "it has no 'config'":
        del held["hyper_parameters"]["config"]
    else:
        held["hyper_parameters"]["config"]["algo"]["name"] = "sedd"
    return held


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "not known",
        "of another shape",
        "averaged arrays that do not go with",
        "no averaged parameters",
        "it has no 'config'",
        "only flm, fmlm, mdlm, ar on 'dit' can be imported",
    ],
)
def test_what_does_not_fit_is_refused(how, reference_run, tmp_path):
    config, params = reference_run
    held = write(tmp_path / "it.ckpt", config, params)
    named = names_of(held)[7].removeprefix("backbone.")
    torch.save(broken(held, how), tmp_path / "it.ckpt")
    with pytest.raises(ValueError, match=how) as error:
        importing.import_run(tmp_path / "it.ckpt", tmp_path / "run", "ema", config)
    if how in ("missing", "of another shape"):
        assert named in str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_vocabulary_is_refused(tmp_path, data_dir):
    with pytest.raises(ValueError, match="has 61 tokens, but the tokenizer 'grammar98' 99"):
        importing.import_run(FIXTURES / "flm.ckpt", tmp_path / "run", "ema", run_config(data_dir))


@pytest.mark.parametrize("size", [0, 100, 1000, -1000, -1])
def test_a_truncated_file_is_refused(size, tmp_path):
    whole = (FIXTURES / "flm.ckpt").read_bytes()
    (tmp_path / "it.ckpt").write_bytes(whole[:size])
    with pytest.raises(ValueError, match="is no checkpoint that can be imported"):
        importing.import_run(tmp_path / "it.ckpt", tmp_path / "run", "ema", None)
    assert not (tmp_path / "run").exists()


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_runs_nothing(tmp_path):
    made = tmp_path / "made"
    held = torch.load(FIXTURES / "flm.ckpt", weights_only=True)
    pickle.loads(pickle.dumps(Evil(made)))
    assert made.is_dir()  # it would
    made.rmdir()
    for place in (held, held["hyper_parameters"], held["hyper_parameters"]["config"], held["state_dict"]):
        place["more"] = Evil(made)
        for zipped in (True, False):
            torch.save(held, tmp_path / "it.ckpt", _use_new_zipfile_serialization=zipped)
            with pytest.raises(ValueError, match="nothing in it was run"):
                importing.import_run(tmp_path / "it.ckpt", tmp_path / "run", "ema", None)
        del place["more"]
    (tmp_path / "it.ckpt").write_bytes(pickle.dumps(Evil(made)))
    with pytest.raises(ValueError, match="nothing in it was run"):
        importing.import_run(tmp_path / "it.ckpt", tmp_path / "run", "ema", None)
    assert not made.exists() and not (tmp_path / "run").exists()


def test_a_foreign_class_is_a_record_and_not_imported(tmp_path, monkeypatch):
    """Even a name that is read as a record never reaches the module that it names."""
    ran = tmp_path / "ran"
    (tmp_path / "omegaconf").mkdir()
    (tmp_path / "omegaconf" / "__init__.py").write_text(f"open({str(ran)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importing.load_imported(FIXTURES / "omegaconf.ckpt").step == 70
    assert not ran.exists()
