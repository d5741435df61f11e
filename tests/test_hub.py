"""Models on the Hugging Face Hub: pushed, read wherever a checkpoint is read, and refused where they are not what was pushed."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import error_of
from command_line import flowlm as command
from hub_server import TOKEN, commit_of, environment, running, served  # noqa: F401
from test_trained import ROOT, SMALL, make_run
from toy import run_config

import flowlm
from flowlm.data.tokenizers import shipped
from flowlm.engine.build import build
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.evaluation import evaluator as evaluation
from flowlm.exchange import push as pushing
from flowlm.exchange.export import export
from flowlm.runs import directory as run_directory
from flowlm.runs.integrity import checksum
from flowlm.runs.model import Model, Samples
from flowlm.runs.trained import load_origin, load_teacher, load_trained
from flowlm.system import hub, storage

MODEL = "owner/small.model-1"
PLACE = f"hub:{MODEL}"
FILES = {"README.md", "config.json", "manifest.json", "model.safetensors", "tokenizer.json", "versions.json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", "flow_map", **{"objective.noise_scale": 0.5})


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """What `flowlm push` sends, {name: content}, but for the card."""
    out = tmp_path_factory.mktemp("exports") / "out"
    export(run, out, Layout(make_mesh(data=1)), format="safetensors")
    return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.fixture
def login(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def sent(exported, monkeypatch):
    """`flowlm push` exports nothing anew: what it sends is `exported`."""

    def export(directory, out, layout, **settings):
        out.mkdir()
        for name, content in exported.items():
            (out / name).write_bytes(content)

    monkeypatch.setattr(pushing, "export", export)


def params_of(place):
    return load_trained(place, Layout(make_mesh(data=1))).params


# --- there and back ------------------------------------------------------------------------------------------------


def test_what_is_pushed_is_read_again_to_the_last_bit(run, served, login, monkeypatch):  # noqa: F811
    monkeypatch.setattr(
        "flowlm.exchange.card.network_evaluations", lambda config: 3.0
    )  # which takes long: test_card.py
    ended = command("push", run, f"--repo={MODEL}")
    files = served.models[MODEL][-1]
    pinned = f"{PLACE}@{commit_of(files)}"
    assert ended.status == 0 and ended.out.splitlines()[0] == pinned
    assert len(served.models[MODEL]) == 2 and files.keys() == FILES  # one commit after the empty first
    assert checksum(params_of(PLACE)) == checksum(params_of(run)) == json.loads(files["manifest.json"])["checksum"]
    assert checksum(flowlm.load(pinned).run.params) == checksum(params_of(run))
    assert TOKEN not in ended.out + ended.err and not any(TOKEN.encode() in content for content in files.values())


def test_a_download_is_told_in_one_line_and_made_once(exported, served, capsys):  # noqa: F811
    commit = served.put(MODEL, exported)
    folder = storage.path(PLACE)
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if line.startswith("fetching ")] == [
        f"fetching 4 files of {PLACE}@{commit[:7]} from {hub.client().constants.ENDPOINT}"
    ]
    hub.fetch.cache_clear()  # as in another process
    assert storage.path(PLACE) == storage.path(f"{PLACE}@{commit}") == folder
    assert "fetching" not in capsys.readouterr().err
    assert served.asked("model.safetensors") == 1 and served.asked("README.md") == 0  # words for people are not fetched


def test_a_revision_is_that_one_and_main_is_the_newest(exported, served):  # noqa: F811
    first = served.put(MODEL, exported)
    second = served.put(MODEL, exported | {"README.md": b"other words"})
    assert storage.path(f"{PLACE}@{first}").name == first and storage.path(PLACE).name == second
    assert storage.spelled(PLACE) == f"{PLACE}@{second}" and storage.last_name(f"{PLACE}@{first}") == "small.model-1"


def test_what_is_here_is_read_without_the_hub(exported, served, monkeypatch):  # noqa: F811
    served.put(MODEL, exported)
    folder = storage.path(PLACE)
    hub.fetch.cache_clear()
    monkeypatch.setattr(
        hub.client().constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{filename}"
    )
    assert storage.path(PLACE) == folder
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # as the client does between one try and the next
    told = error_of("sample", "hub:owner/other")
    assert told == ("flowlm: the Hub cannot be reached, and hub:owner/other is not in its cache: try again later")


def test_what_reads_a_checkpoint_reads_one_on_the_hub(run, exported, served, tmp_path, monkeypatch):  # noqa: F811
    served.put(MODEL, exported)
    wanted = checksum(params_of(run))

    def draw(self, num, steps, seed, sampler, *length):
        return Samples([checksum(self.run.params)], None, [], "", steps, seed, 0.0, 0.0)

    monkeypatch.setattr(Model, "draw", draw)
    assert command("sample", PLACE, "--steps=1").out.splitlines() == [wanted]
    assert command("inspect", PLACE).out.splitlines()[-1] == f"checksum    {wanted}"
    assert command("export", PLACE, f"--out={tmp_path / 'out'}").status == 0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["checksum"] == wanted


@pytest.mark.parametrize("setting", ["teacher", "init_from"])
def test_a_run_begins_at_a_model_and_says_at_which_commit(setting, run, exported, served, tmp_path):  # noqa: F811
    pinned = f"{PLACE}@{served.put(MODEL, exported)}"
    tokenizer, layout = shipped("grammar98"), Layout(make_mesh(data=1))
    config = run_config("", "flow_map", **SMALL, **{setting: PLACE})
    experiment = build(config, tokenizer.vocab_size)
    read = {"teacher": load_teacher, "init_from": load_origin}[setting](config, tokenizer, experiment, layout)
    read = read.flow if setting == "teacher" else read
    np.testing.assert_array_equal(read["embedding"], params_of(run)["embedding"])
    run_directory.prepare_workdir(tmp_path / "run", config, tokenizer)
    assert run_directory.load_workdir(tmp_path / "run")[0][setting] == pinned
    for spelling in (PLACE, pinned):  # taken up again by either name
        config[setting] = spelling
        run_directory.check_workdir(tmp_path / "run", config, tokenizer)
    served.put(MODEL, {**exported, "manifest.json": exported["manifest.json"] + b" "})
    hub.fetch.cache_clear()
    config[setting] = PLACE  # which is another model by now
    with pytest.raises(ValueError, match=f"1 settings differ: {setting} = '{pinned}' there, '{PLACE}' here"):
        run_directory.check_workdir(tmp_path / "run", config, tokenizer)


def test_what_is_found_of_a_model_is_kept_where_it_is_told_alone(exported, served, tmp_path, monkeypatch):  # noqa: F811
    served.put(MODEL, exported)

    class Looks:
        def __init__(self, *arguments):
            pass

        def __call__(self, params, step, num, final=False):
            return evaluation.Evaluation(step, {}, {}, num=num)

    monkeypatch.setattr(evaluation, "Evaluator", Looks)
    monkeypatch.setattr(evaluation.Evaluation, "show", lambda self, wide: None)
    monkeypatch.setattr("flowlm.data.open_dataset", lambda *arguments, **how: None)
    assert "is only read: nothing is written there, --results=DIR keeps it" in command("evaluate", PLACE).err
    assert command("evaluate", PLACE, f"--results={tmp_path / 'results'}", "--num=8").status == 0
    assert json.loads((tmp_path / "results/evaluation.json").read_text())["num"] == 8
    assert {file.name for file in storage.path(PLACE).iterdir()} == FILES - {"README.md"}
    for line in (["evaluate", PLACE, f"--results={PLACE}"], ["export", PLACE, f"--out={PLACE}"]):
        wanted = f"flowlm: {PLACE} is on the Hub, where only `flowlm push` writes: give a directory of your own"
        assert error_of(*line) == wanted


def test_a_fresh_process_is_told_of_the_hub_by_its_environment(exported, tmp_path):
    program = f"from flowlm.system import storage; print(storage.path({PLACE!r}))"
    with running() as (served, address):  # noqa: F811
        commit = served.put(MODEL, exported)
        served.private.add(MODEL)
        told = os.environ | environment(address, tmp_path) | {"HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
        line = [sys.executable, "-c", program]
        done = subprocess.run(line, env=told, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.strip() == str(tmp_path / "hub/models--owner--small.model-1/snapshots" / commit), done.stderr
    assert f"from {address}" in done.stderr and TOKEN not in done.stdout + done.stderr


# --- what is refused -----------------------------------------------------------------------------------------------


def refused(place=PLACE):
    return error_of("sample", place).removeprefix("flowlm: ")


def test_a_model_that_is_missing_private_or_gated_is_one_line(exported, served, monkeypatch):  # noqa: F811
    served.put(MODEL, exported)
    absent = "the Hub shows no {} to this login: log in by `hf auth login` if it is private or gated, otherwise mend"
    assert refused("hub:owner/absent").startswith(absent.format("hub:owner/absent"))
    revision = f"{PLACE}@{'0' * 40}"
    assert refused(revision) == (
        f"the Hub shows no {revision} to this login: give a branch, a tag or a commit that it has"
    )
    served.private.add(MODEL)
    assert refused().startswith(absent.format(PLACE))
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    assert refused() == f"the Hub refuses {PLACE} to this login (401): `hf auth login` with a token that may do this"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert not command("inspect", PLACE).status
    hub.fetch.cache_clear()
    served.gated.add("owner/gated")
    served.put("owner/gated", exported)
    assert refused("hub:owner/gated").startswith(absent.format("hub:owner/gated"))


@pytest.mark.parametrize("name", ["hub:", "hub:gpt2", "hub:a/b/c", "hub:a/b@", "hub:a b/c", "hub:../x", "hub:a/b@c@d"])
def test_a_name_that_is_none_is_told(name, served):  # noqa: F811
    told = refused(name)
    assert told.startswith(f"{name} is no name") and "\n" not in told and not served.requests


@pytest.mark.parametrize(
    ("files", "because"),
    [
        ({"config.json": b'{"model_type": "gpt2"}', "pytorch_model.bin": b"\x80\x04."}, "it has no manifest.json"),
        ({"manifest.json": b'{"name": "an app"}', "x.py": b""}, "its manifest.json is of something else"),
    ],
    ids=["transformers", "app"],
)
def test_a_repository_of_something_else_is_one_line_and_none_of_it_is_fetched(files, because, served):  # noqa: F811
    served.put(MODEL, files)
    assert refused() == f"{PLACE} is no model of flowlm, because {because}: `flowlm push` makes one"
    assert {path.rpartition("/")[2] for _, path in served.requests if "/resolve/" in path} == {"manifest.json"}


def altered(exported, name, kind):
    """Files of which one is not what was pushed."""
    files, content = dict(exported), exported[name]
    if kind == "missing":
        files.pop(name)
    else:
        files[name] = (
            content[: len(content) // 2] if kind == "cut" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        )
    return files


@pytest.mark.parametrize("name", sorted(FILES - {"README.md", "manifest.json"}))
@pytest.mark.parametrize("kind", ["missing", "cut", "flipped"])
def test_an_altered_file_is_named_and_never_read(name, kind, exported, served, monkeypatch):  # noqa: F811
    monkeypatch.setattr(run_directory, "load_workdir", None)
    served.put(MODEL, altered(exported, name, kind))
    told = refused()
    assert told.startswith(f"{PLACE} is not what was pushed there ({name}): tell its owner, or remove ")


@pytest.mark.parametrize("kind", ["cut", "flipped", "other", "outside"])
def test_an_altered_manifest_is_named(kind, exported, served):  # noqa: F811
    files = dict(exported)
    told = json.loads(exported["manifest.json"])
    if kind == "other":  # which goes with the altered file beside it, but not with itself
        files = altered(exported, "config.json", "flipped")
        told["sha256"]["config.json"] = hashlib.sha256(files["config.json"]).hexdigest()
    if kind == "outside":
        told["sha256"]["../../../stolen"] = "0" * 64
    files["manifest.json"] = json.dumps(told).encode()
    if kind in ("cut", "flipped"):
        files = altered(exported, "manifest.json", kind)
    served.put(MODEL, files)
    assert refused().startswith(f"{PLACE} is not what was pushed there (manifest.json): tell its owner")


def test_a_copy_that_this_disk_damaged_is_fetched_anew(exported, served):  # noqa: F811
    served.put(MODEL, exported)
    file = Path(storage.path(PLACE) / "model.safetensors").resolve()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    hub.fetch.cache_clear()
    assert checksum(params_of(PLACE)) == json.loads(exported["manifest.json"])["checksum"]
    assert served.asked("model.safetensors") == 2


def test_a_transfer_that_breaks_off_is_taken_up_again(exported, served):  # noqa: F811
    served.put(MODEL, exported)
    served.cut["model.safetensors"] = 1
    assert checksum(params_of(PLACE)) == json.loads(exported["manifest.json"])["checksum"]
    assert served.asked("model.safetensors") == 2


def test_without_the_client_the_extra_is_named(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    wanted = "flowlm: models on the Hub need huggingface_hub: pip install -e .[hub]"
    assert error_of("sample", PLACE) == error_of("push", run, f"--repo={MODEL}") == wanted


# --- pushing -------------------------------------------------------------------------------------------------------


def test_whoever_may_not_push_is_told_before_anything_is_made(run, served, monkeypatch, request):  # noqa: F811
    assert error_of("push", run, f"--repo={MODEL}") == f"flowlm: {PLACE} needs a login: `hf auth login`"
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    refusal = "to this login ({}): `hf auth login` with a token that may do this"
    assert error_of("push", run, f"--repo={MODEL}") == f"flowlm: the Hub refuses {PLACE} {refusal.format(401)}"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "is not a run directory" in error_of("push", run / "nowhere", f"--repo={MODEL}")
    request.getfixturevalue("sent")
    stranger = "hub:stranger/model"
    assert error_of("push", run, "--repo=stranger/model") == f"flowlm: the Hub refuses {stranger} {refusal.format(403)}"
    assert "names a revision" in error_of("push", run, f"--repo={MODEL}@main")
    assert "is no name of a model on the Hub" in error_of("push", run, "--repo=model")
    assert not served.models and not served.stored


def test_private_is_private_or_nothing_is_sent(run, sent, served, login):  # noqa: F811
    assert not command("push", run, f"--repo={MODEL}", "--private").status
    assert served.private == {MODEL}
    assert not command("push", run, f"--repo={MODEL}").status and served.private == {MODEL}
    served.put("owner/public", {})
    told = error_of("push", run, "--repo=owner/public", "--private")
    assert told.startswith("flowlm: hub:owner/public is public already: make it private on its page")
    assert served.models["owner/public"] == [{}]


def test_pushing_from_python_is_the_same(run, sent, served, login):  # noqa: F811
    assert flowlm.push(run, MODEL) == f"{PLACE}@{commit_of(served.models[MODEL][-1])}"
    assert TOKEN.encode() not in b"".join(served.models[MODEL][-1].values())
