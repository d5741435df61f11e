"""What is taken out of a run is the run: the same numbers in every form, and the same text where flowlm is not installed."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict
from jax import export as jax_export
from safetensors.numpy import load_file, save_file
from toy import drawn, run_config, train_only

from flowlm.data.tokenizers import shipped
from flowlm.engine.build import abstract_state, build
from flowlm.engine.sampling import Sampler
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.exchange import export as exporting
from flowlm.exchange import importing, inspection
from flowlm.exchange.export import export
from flowlm.exchange.importing import import_run
from flowlm.exchange.inspection import inspect, print_inspected
from flowlm.runs import directory as run_directory
from flowlm.runs import integrity
from flowlm.runs.checkpoint import Checkpoints, save_params
from flowlm.runs.integrity import checksum
from flowlm.runs.model import load_model
from flowlm.runs.trained import load_settings, load_trained

ROOT = Path(__file__).parent.parent
SMALL = {"model.width": 16, "model.cond": 16, "model.blocks": 1}
FAMILIES = {
    "flow": {"model.input": "raw"},
    "flow_map": {
        "model.preview": True,
        "model.loss_weight": True,
        "objective.temperature": 0.7,
        "objective.gamma": 0.5,
    },
    "masked": {},
    "autoregressive": {},
}


@pytest.fixture(scope="module")
def mesh():
    return Layout(make_mesh(data=1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{family: a run directory of parameters that no initialisation left at zero}."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for family, changes in FAMILIES.items():
        config = run_config("~/.cache/flowlm", family, **SMALL, **changes)
        tokenizer = shipped(config.data.tokenizer)
        params = drawn(build(config, tokenizer.vocab_size).net)
        run_directory.prepare_workdir(folder / family, config, tokenizer)
        save_params(folder / family, params, 5, jnp.float32)
        made[family] = folder / family
    return made


def same(ours, theirs):
    """Whether two trees are equal to the last bit."""
    ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    return all(np.asarray(a).tobytes() == np.asarray(theirs[k]).tobytes() for k, a in ours.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_safetensors_come_back_as_they_went(family, runs, mesh, tmp_path):
    export(runs[family], tmp_path / "one", mesh, format="safetensors")
    import_run(tmp_path / "one", tmp_path / "run", "ema", None)
    export(tmp_path / "run", tmp_path / "two", mesh, format="safetensors")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    before, after = load_trained(runs[family], mesh), load_trained(tmp_path / "run", mesh)
    assert same(before.params, after.params) and before.step == after.step == 5
    assert checksum(before.params) in (tmp_path / "one" / "README.md").read_text()
    # It is a run as it lies there, on any mesh, whatever people write on its card.
    (tmp_path / "one" / "README.md").write_text("other words")
    run = load_trained(tmp_path / "one", Layout(make_mesh(data=8)))
    assert same(before.params, run.params) and run.step == 5
    assert {len(a.sharding.device_set) for a in jax.tree.leaves(run.params)} == {8}


def test_card_says_what_the_reference_has_not(runs, mesh, tmp_path):
    export(runs["flow_map"], tmp_path / "map", mesh, format="safetensors", dtype="bfloat16")
    card = (tmp_path / "map" / "README.md").read_text()
    assert "`input: both`, `preview: True`, `gate_init: 1.0`, `loss_weight: True`" in card and "bfloat16" in card
    held = (tmp_path / "map" / "model.safetensors").stat().st_size
    assert held < 2.5 * sum(a.size for a in jax.tree.leaves(load_trained(runs["flow_map"], mesh).params))


def test_parameters_alone_are_a_run_on_any_mesh(runs, mesh, tmp_path):
    run = load_trained(runs["flow"], mesh)
    export(runs["flow"], tmp_path / "half", mesh, format="params", dtype="bfloat16")
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), run.params)
    for devices in (1, 8):
        half = load_trained(tmp_path / "half", Layout(make_mesh(data=devices)))
        assert same(half.params, rounded) and not same(half.params, run.params) and half.step == 5
        assert {a.dtype for a in jax.tree.leaves(half.params)} == {jnp.dtype("float32")}
        assert {len(a.sharding.device_set) for a in jax.tree.leaves(half.params)} == {devices}
    assert len([p for p in (tmp_path / "half" / "params").rglob("*") if p.is_file()]) < 15


def test_parameters_alone_teach_but_are_not_trained_on(runs, mesh, tmp_path, data_dir):
    config = run_config(
        data_dir, "flow_map", **SMALL, **{"model.input": "raw", "steps": 1, "teacher": str(runs["flow"])}
    )
    train_only(config, tmp_path / "student")
    student, teacher = (load_trained(path, mesh).params for path in (tmp_path / "student", runs["flow"]))
    np.testing.assert_allclose(student["embedding"], teacher["embedding"], rtol=1e-6)  # which a student keeps
    with pytest.raises(ValueError, match="holds parameters alone, no training state: give another --workdir"):
        train_only(run_config(data_dir, "flow", **SMALL, **FAMILIES["flow"]), runs["flow"])


def denoised(net, params, z, tau):
    """Logits [B, L, V] of the network in this process."""
    return jax.jit(lambda params, z: net.unembed(params, net.apply(params, z, tau, tau)))(params, z)


FRESH = """
import runpy, sys
sys.modules["flowlm"] = None  # importing it is an error
load = runpy.run_path(sys.argv[1])["load"]
import jax, json, numpy as np
out = {}
for directory in sys.argv[2:]:
    sampler, weights, _ = load(directory)
    out[directory] = [np.asarray(sampler(weights, np.uint32(7), np.zeros(b, np.int32))).tolist() for b in (1, 5)]
print(json.dumps(out))
"""


def test_programs_write_the_same_elsewhere(runs, mesh, tmp_path):
    """Ids of the in-process sampler, in a process that has no flowlm, at numbers of rows that no one told the exporter."""
    folders, wanted = {}, {}
    for family, path in runs.items():
        dtype, steps = ("bfloat16", 18) if family == "autoregressive" else ("float32", 3)
        out = tmp_path / family
        export(path, out, mesh, format="jax", steps=steps, dtype=dtype)
        run = load_trained(path, mesh)
        params = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype).astype("float32"), run.params)
        draw = Sampler(run.experiment.net, list(run.experiment.family.samplers().values())[-1], mesh)
        wanted[str(out)] = draw(params, jax.random.key(7), 5, steps)
        folders[family] = out
    command = [sys.executable, "-c", FRESH, str(ROOT / "examples" / "run_exported.py"), *wanted]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for folder, (one, five) in json.loads(done.stdout.splitlines()[-1]).items():
        assert len(np.unique(wanted[folder])) > 5
        np.testing.assert_array_equal(five, wanted[folder], folder)
        np.testing.assert_array_equal(one, wanted[folder][:1], folder)

    # The denoisers, and what the programs were lowered for.
    for family, folder in folders.items():
        program = jax_export.deserialize(bytearray((folder / "denoiser.jax").read_bytes()))
        assert program.platforms == ("cpu", "cuda", "tpu")
        run = load_trained(runs[family], mesh)
        net, key, tau = run.experiment.net, jax.random.key(1), jnp.array([0.2, 0.9])
        discrete = family in ("masked", "autoregressive")
        state = (
            jax.random.randint(key, (2, net.length), 0, 99) if discrete else jax.random.normal(key, (2, net.length, 16))
        )
        with np.load(folder / "weights.npz") as weights:
            logits = program.call(dict(weights), state, tau, tau)
        params = run.params
        if family == "autoregressive":
            params = jax.tree.map(lambda a: a.astype("bfloat16").astype("float32"), params)
        z = net.embed(params, state) if discrete else state
        expected = denoised(net, params, z, tau)
        np.testing.assert_allclose(logits, expected, atol=1e-4)

    # A file that was changed is not run, and not inspected.
    weights = folders["flow"] / "weights.npz"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="weights.npz is not the file that was written"):
        inspect(folders["flow"], mesh)
    with pytest.raises(ValueError, match="weights.npz is not the file that was exported"):
        runpy.run_path(str(ROOT / "examples" / "run_exported.py"))["load"](folders["flow"])


def test_every_form_has_the_same_checksum(runs, mesh, tmp_path, capsys):
    export(runs["masked"], tmp_path / "st", mesh, format="safetensors")
    export(runs["masked"], tmp_path / "params", mesh, format="params")
    export(runs["masked"], tmp_path / "jax", mesh, format="jax", steps=2)
    paths = {
        runs["masked"]: "parameters of a run",
        tmp_path / "params": "parameters of a run",
        tmp_path / "st": "parameters that can be imported",
        tmp_path / "st" / "model.safetensors": "parameters that can be imported",
        tmp_path / "jax": "programs: 2 sampling steps, for cpu, cuda, tpu",
    }
    digest = checksum(load_trained(runs["masked"], mesh).params)
    for path, kind in paths.items():
        found = inspect(path, mesh)
        assert found.kind == kind and found.step == 5 and checksum(found.params) == digest
    print_inspected(found)
    printed = capsys.readouterr().out
    assert (
        digest in printed and "blocks/mlp_in/kernel" in printed and "(1, 16, 64)" in printed and "grammar98" in printed
    )
    changed = jax.tree.map(np.copy, found.params)
    changed["unembed_bias"][0] += 1e-6
    assert checksum(changed) != digest


@pytest.mark.parametrize("format", ["params", "safetensors", "jax"])
def test_a_flipped_bit_is_found_wherever_it_falls(format, runs, mesh, tmp_path):
    """30 of 30 in every file that was written but the card, which people may change, and in the manifest itself."""
    out = tmp_path / "out"
    export(runs["flow"], out, mesh, format=format, steps=1 if format == "jax" else None)
    files = sorted(p for p in out.rglob("*") if p.is_file() and p.stat().st_size and p.name != "README.md")
    rng = np.random.default_rng(0)
    inspect(out, mesh)
    for path in [*files, *rng.choice(files, 30 - len(files))]:
        before = path.read_bytes()
        content = bytearray(before)
        # In a line break of the manifest it would change nothing that is read.
        place = rng.choice([i for i, byte in enumerate(before) if path.suffix != ".json" or chr(byte).isalnum()])
        content[place] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(content))
        with pytest.raises(ValueError, match="is not the file that was written, as manifest.json knows it"):
            inspect(out, mesh)
        path.write_bytes(before)
    assert inspect(out, mesh).step == 5


def test_an_export_is_read_back(runs, mesh, tmp_path, monkeypatch):
    """Where the disk gives back other numbers, it is an error, and what was written there is refused."""
    genuine = inspection.load_trained
    with monkeypatch.context() as patch:
        patch.setattr(
            inspection,
            "load_trained",
            lambda *arguments: (run := genuine(*arguments))._replace(params=jax.tree.map(lambda a: a + 1, run.params)),
        )
        with pytest.raises(RuntimeError, match="does not give back the parameters that were written there"):
            export(runs["flow"], tmp_path / "out", mesh, format="params")
    check_refused(tmp_path / "out", mesh, tmp_path)


def check_refused(out, mesh, folder):
    """Every reader of runs and exports says in one line that `out` is unfinished, and what to do."""
    said = rf"^{out} was not written to its end: remove it and (make it again|export again)$"
    readers = [
        lambda: inspect(out, mesh),
        lambda: load_trained(out, mesh),
        lambda: load_settings(out, mesh),
    ]
    if not any((out / name).exists() for name in ("params", "model.safetensors")):  # those are not trained on anyway
        readers.append(lambda: train_only(run_config("", "flow", **SMALL, **FAMILIES["flow"]), out))
    if (out / "model.safetensors").exists():
        readers.append(lambda: import_run(out, folder / "imported", "ema", None))
    if (out / "sampler.jax").exists():
        readers.append(lambda: runpy.run_path(str(ROOT / "examples/run_exported.py"))["load"](out))
    for read in readers:
        with pytest.raises(ValueError, match=said):
            read()


class Killed(BaseException):
    """Stands for a signal that lets nothing be cleaned up."""


@pytest.mark.parametrize("cut", ["before the arrays", "before the manifest"])
@pytest.mark.parametrize("format", ["params", "safetensors", "jax", "import"])
def test_what_is_cut_in_the_middle_is_refused(format, cut, runs, mesh, tmp_path, monkeypatch):
    def kill(*arguments):
        raise Killed

    if format == "import":
        export(runs["flow"], tmp_path / "st", mesh, format="safetensors")
    if cut == "before the manifest":
        monkeypatch.setattr(integrity, "seal", kill)
    else:
        monkeypatch.setattr(exporting, "save_params", kill)
        monkeypatch.setattr(importing, "save_params", kill)
        monkeypatch.setattr(type(epath.Path()), "write_bytes", kill)
    with pytest.raises(Killed):
        if format == "import":
            import_run(tmp_path / "st", tmp_path / "out", "ema", None)
        else:
            export(runs["flow"], tmp_path / "out", mesh, format=format, steps=1 if format == "jax" else None)
    assert (tmp_path / "out/config.json").exists()
    check_refused(tmp_path / "out", mesh, tmp_path)
    with pytest.raises(ValueError, match="is not empty: give a new directory, or remove it first"):
        export(runs["flow"], tmp_path / "out", mesh, format="params")


def test_an_export_that_is_killed_is_refused(runs, mesh, tmp_path):
    """By SIGKILL, between its first file of parameters and the last."""
    program = """
import os, signal, sys
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.exchange import export
written = export.save_params
def save_params(*arguments):
    written(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
export.save_params = save_params
export.export(*sys.argv[1:], Layout(make_mesh(data=1)), format="params")
"""
    out = tmp_path / "out"
    line = [sys.executable, "-c", program, str(runs["flow"]), str(out)]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL and (out / "params").is_dir(), ended.stderr
    check_refused(out, mesh, tmp_path)


def test_exports_from_before_manifests_are_read(mesh):
    for path in sorted((ROOT / "checkpoints").iterdir()):
        if not (path / "manifest.json").exists():
            assert inspect(path, mesh).step > 0


def broken(arrays, how):
    if how == "missing":
        return {k: v for k, v in arrays.items() if k != "blocks.0.mlp.0.bias"}
    if how == "not known":
        return arrays | {"blocks.1.mlp.0.bias": arrays["blocks.0.mlp.0.bias"]}
    return arrays | {"blocks.0.mlp.0.bias": arrays["blocks.0.mlp.0.bias"][:-1]}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "missing: blocks.0.mlp.0.bias$"),
        ("not known", "not known: blocks.1.mlp.0.bias$"),
        ("of another shape", r"of another shape: blocks.0.mlp.0.bias \(63,\) instead of \(64,\)"),
    ],
)
def test_safetensors_that_do_not_fit_are_refused(how, message, runs, mesh, tmp_path):
    export(runs["flow"], tmp_path / "st", mesh, format="safetensors")
    file = tmp_path / "st" / "model.safetensors"
    save_file(broken(load_file(file), how), file)
    (tmp_path / "st" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=message):
        import_run(file, tmp_path / "run", "ema", None)
    assert not (tmp_path / "run").exists()


def test_bad_arguments_and_files(runs, mesh, tmp_path):
    export(runs["flow"], tmp_path / "st", mesh, format="safetensors")
    file = tmp_path / "st" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="model.safetensors is not the file that was written"):
        import_run(file, tmp_path / "run", "ema", None)
    (tmp_path / "st" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is damaged"):
        import_run(file, tmp_path / "run", "ema", None)
    with pytest.raises(ValueError, match="leave out --weights=live"):
        import_run(file, tmp_path / "run", "live", None)
    with pytest.raises(FileNotFoundError, match="there is no .*nothing"):
        inspect(tmp_path / "nothing", mesh)
    (tmp_path / "st" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json beside it"):
        import_run(file, tmp_path / "run", "ema", None)
    out = tmp_path / "out"
    for arguments, message in (
        (dict(format="jax"), "needs --steps=N"),
        (dict(format="params", steps=3), "neither --steps nor --sampler"),
        (dict(format="jax", steps=3, sampler="eulr"), "no sampler 'eulr': there are euler, ancestral"),
    ):
        with pytest.raises(ValueError, match=message):
            export(runs["flow"], out, mesh, **arguments)
    assert not out.exists()
    with pytest.raises(ValueError, match="is not empty"):
        export(runs["flow"], tmp_path / "st", mesh, format="params")


def test_a_missing_package_says_which_extra_has_it(runs, mesh, tmp_path, monkeypatch):
    for package, arguments in (
        ("safetensors", dict(format="safetensors")),
        ("flatbuffers", dict(format="jax", steps=1)),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"needs {package}: pip install -e \.\[export\]"):
            export(runs["flow"], tmp_path / "out", mesh, **arguments)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install -e \.\[torch\]"):
        import_run(ROOT / "tests" / "data" / "flm_reference" / "flm.ckpt", tmp_path / "out", "ema", None)
    assert not (tmp_path / "out").exists()


def test_a_run_of_the_past_is_resumed_as_it_was_then(mesh, tmp_path, data_dir):
    """tests/data/run is as 0.1 wrote it (its README says how). It must always be readable, whatever settings are new."""
    shutil.copytree(Path(__file__).parent / "data" / "run", tmp_path / "run")
    run = load_trained(tmp_path / "run", mesh)
    assert run.step == 2
    assert checksum(run.params) == (tmp_path / "run" / "checksum.txt").read_text().strip()
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    state = checkpoints.restore(abstract_state(run.experiment, mesh))
    checkpoints.close()
    assert int(state.step) == 2 and not same(state.params, state.ema)
    moments = [a for a in jax.tree.leaves(state.opt_state) if a.ndim > 0]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params)) and any(np.abs(a).max() > 0 for a in moments)
    config = run.config.unlock()
    config.steps, config.data.dir = 8, str(data_dir)
    train_only(config.lock(), tmp_path / "run")
    # What the release of that time made of it, six steps later: bitwise on the machine where it was recorded.
    recorded = json.loads((Path(__file__).parent / "data/run_at_8.json").read_text())
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    state = checkpoints.restore(abstract_state(run.experiment, mesh))
    checkpoints.close()
    assert int(state.step) == 8
    for part in ("params", "ema", "opt_state"):
        for leaf, (rms, projection) in zip(jax.tree.leaves(getattr(state, part)), recorded[part], strict=True):
            values = np.asarray(leaf, np.float64).reshape(-1)
            close = 1e-4 * (rms + 1e-12)
            assert np.sqrt(np.mean(values**2)) == pytest.approx(rms, abs=close)
            line = np.random.default_rng(0).standard_normal(
                values.size
            )  # a change of any value is one of its sum along it
            assert values @ line == pytest.approx(projection, abs=close * values.size**0.5)
    model = load_model(tmp_path / "run")
    for row, ids in recorded["ids"].items():
        sampler, _, steps = row.partition("@")
        # Nearly equal logits may be in another order on another processor.
        assert (model.sample_ids(8, int(steps), 3, sampler) == ids).mean() > 0.95
