"""Whatever is wrong is said in one clear line that says how to mend it, before any expensive work."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from command_line import error_of, flowlm
from toy import run_config

from flowlm.data import dataset as reader
from flowlm.data.tokenizers import shipped
from flowlm.engine import build as assembly
from flowlm.runs import directory as run_directory

ROOT = Path(__file__).parents[1]
CONFIG = "--config=experiments/test.py"


@pytest.fixture
def nothing_expensive(tmp_path, monkeypatch):
    """A data directory with nothing in it; preparing data, making a state or compiling a sampler fails the test."""

    def expensive(*arguments, **settings):
        raise AssertionError("expensive work before the error")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(reader, "_prepare", expensive)
    for name in (
        "training.Checkpoints",
        "engine.sampling.Sampler",
        "evaluation.evaluator.Evaluator",
        "scale.bench._run",
        "scale.bench._child",
    ):
        monkeypatch.setattr(f"flowlm.{name}", expensive)
    return tmp_path / "data"


# --- the table ---------------------------------------------------------------------------------------------------
# A line as it is typed, and what is said of it: parts that follow one another, with ` ... ` between them. In braces stand the
# places below and `{train}`, which is the test experiment with a new run directory.

COMMANDS = {
    "": "which command? `flowlm --help` lists them",
    "trian": "no command trian: did you mean train?",
    "sampel checkpoints/fmlm": "no command sampel: did you mean sample?",
    "frobnicate": "no command frobnicate: `flowlm --help` lists them",
    "help trian": "no command trian: did you mean train?",
    "train": "train needs --config=experiments/NAME.py[:ARG] and --workdir=DIR: see `flowlm train --help`",
    "train --config=experiments/test.py": "train needs --workdir=DIR",
    "train --workdir={new}": "train needs --config=experiments/NAME.py",
    "sample": "sample needs --checkpoint=DIR (or DIR alone): see `flowlm sample --help`",
    "evaluate": "evaluate needs --checkpoint=DIR",
    "compare": "compare needs --runs=DIR,DIR,... (or DIR DIR ... alone): see `flowlm compare --help`",
    "prepare": "prepare needs --source=textfiles|jsonl ... --tokenizer=NAME, --length=N and --out=DIR",
    "study": "study needs --study=experiments/NAME.py[:ARG], --workdir=DIR and --results=DIR",
    "report": "report needs --runs=DIR,DIR,... (or DIR DIR ... alone) and --out=DIR",
    "export": "export needs --checkpoint=DIR ... and --out=DIR",
    "push": "push needs --checkpoint=DIR ... and --repo=NAME/MODEL: see `flowlm push --help`",
    "push {empty} --repo=model": "hub:model is no name of a model on the Hub: write hub:NAME/MODEL",
    "import": "import needs --checkpoint=PATH ... and --to=DIR",
    "inspect": "inspect needs --checkpoint=PATH",
    "plan": "plan needs --config=experiments/NAME.py",
    "plan --config=experiments/test.py": "either --topology=v5e:4x4,... or --device",
    "train somewhere": "train takes flags only, got somewhere",
    "bench flow": "bench takes flags only, got flow",
    "sample {empty} {file}": "sample takes one DIR, got 2",
    "sample {empty} --checkpoint={file}": "or --checkpoint, not both",
}

FLAGS = {
    "{train} --steps=20": "--steps is no flag of train: --config.steps=20",
    "{train} --steps 20": "--steps is no flag of train: --config.steps=20",
    "{train} --learning_rate=1": "--learning_rate is no flag of train: --config.optimizer.learning_rate=1",
    "{train} --evaluation.steps=8": "--evaluation.steps is no flag of train: --config.evaluation.steps=8",
    "{train} --workdri=x": "--workdri is no flag of train: --workdir=x",
    "{train} --num=3": "--num is no flag of train, but of sample and evaluate",
    "{train} --frobnicate": "--frobnicate is no flag of train: `flowlm train --help` lists them",
    "{train} --nodistribute": "--nodistribute is no flag of train: --distributed",
    "sample {empty} --step=8": "--step is no flag of sample: --steps=8",
    "sample {empty} --temperature=0.5": "--temperature is no flag of sample: --objective=temperature=0.5",
    "sample {empty} --config.steps=3": "--config.steps is no flag of sample",
    "evaluate {empty} --result=x": "--result is no flag of evaluate: --results=x",
    "plan --config=experiments/test.py --topolgy=v5e:2x2": "--topolgy is no flag of plan: --topology=v5e:2x2",
    "bench --vocabb=3": "--vocabb is no flag of bench: --vocab=3",
    "compare {empty} --out=x": "--out is no flag of compare, but of ",
    "inspect {empty} --workdir=x": "--workdir is no flag of inspect, but of train and study",
    "sample {empty} --steps": "--steps",
    "train --config": "--config",
    "{train} --profile_steps=5": "--profile_steps takes the first step ... got '5'",
    "export {empty} --out={new} --format=onnx": "--format=onnx: ... params|safetensors|jax",
    "export {empty} --out={new} --dtype=float16": "--dtype=float16: ... float32|bfloat16",
    "export {empty} --out={new} --format=jax": "--format=jax needs --steps=N",
    "export {empty} --out={new} --format=jax --steps=1,2": "one number of --steps",
    "import {empty} --to={new} --weights=best": "--weights=best: ... ema|live",
    "prepare --source=pdf --path={file} --tokenizer=chars --length=8 --out={new}": "--source=pdf: ... textfiles, jsonl",
    "bench --pairs=flow": "--pairs takes FIRST/SECOND of flow, dense",
    "bench --formulation=flows": "--formulation takes one of flow, dense, ... got 'flows'",
    "evaluate {empty} --objective=eta=0": "give --results=DIR",
    "evaluate {empty} --samples_only": "give --results=DIR",
    "sample {empty} --objective=eta": "--objective takes KEY=VALUE,..., got 'eta'",
    "sample {grammar} --objective=heat=1": "has no 'heat': it has ... gamma",
    "sample {grammar} --objective=gamma=hot": "objective.gamma cannot be 'hot': it is a float, 0.0 there",
    "sample {grammar} --sampler=maps": "no sampler 'maps': there are map, map-noise0.5; did you mean map?",
}

NUMBERS = {
    "sample {empty} --num=0": "--num=0 ... positive",
    "sample {empty} --num=many": "--num=many: not a whole number",
    "sample {empty} --seed=-1": "--seed=-1",
    "sample {empty} --seed=4294967296": "--seed=4294967296",
    "sample {empty} --steps=0": "--steps takes positive whole numbers, got '0'",
    "sample {empty} --steps=8,some": "--steps takes positive whole numbers, got '8,some'",
    "evaluate {empty} --num=0": "--num=0 ... positive",
    "prepare --length=1": "--length=1",
    "study --parallel=0": "--parallel=0 ... positive",
    "plan --per_chip=0": "--per_chip=0 ... positive",
    "bench --repeats=0": "--repeats=0 ... positive",
    "bench --rounds=0": "--rounds=0 ... positive",
    "bench --attention_cap=-1": "--attention_cap=-1",
    "{train} --config.steps=0": "steps must be at least 1, got 0: set --config.steps=1000",
    "{train} --config.batch_size=0": "batch_size must be at least 1, got 0: set --config.batch_size=128",
    "{train} --config.seed=-1": "seed must be in [0, 4294967295], got -1",
    "{train} --config.optimizer.learning_rate=0": "learning_rate must be above 0, got 0",
    "{train} --config.ema_decay=1.5": "ema_decay must be in [0, 1], got 1.5",
    "{train} --config.steps=many": "--config.steps=many: not a whole number",
    "{train} --config.optimizer.learning_rate=fast": "--config.optimizer.learning_rate=fast: not a number",
    "{train} --config.accumulation=3 --config.mesh.data=1": (
        "batch_size 32 is not a multiple of accumulation 3 x 1 devices: use 30 or 33"
    ),
    "{train} --config.accumulation=8 --config.mesh.data=8": (
        "batch_size 32 is not a multiple of accumulation 8 x 8 devices: use 64"
    ),
    "{train} --config.mesh.data=9": "mesh.data = 9, mesh.model = 1, but 8 devices are here",
}

SETTINGS = {
    "train --config.steps=3": "--config.steps changes an experiment: give --config=experiments/NAME.py too",
    "{train} --config.learning_rate=1": "has no setting learning_rate: --config.optimizer.learning_rate=1",
    "{train} --config.optimizer.learnin_rate=1": (
        "has no setting optimizer.learnin_rate: --config.optimizer.learning_rate=1"
    ),
    "{train} --config.optimiser.learning_rate=1": (
        "has no setting optimiser.learning_rate: --config.optimizer.learning_rate=1"
    ),
    "{train} --config.stepz=3": "has no setting stepz: --config.steps=3",
    "{train} --noconfig.model.previews": "has no setting model.previews: --config.model.preview",
    "{train} --config.frobnicate=3": "has no setting frobnicate: flowlm/config.py lists them",
    "{train} --config.model.vocab_size=100": (
        "model.vocab_size is 100, ... 'grammar98' has 99 tokens ... --config.model.vocab_size=99"
    ),
    "{train} --config.objective.family=flows": "unknown objective.family 'flows': choose one of [ ... 'flow'",
    "{train} --config.objective.loss=mse": (
        "unknown objective.loss 'mse': choose one of ['cross_entropy', 'squared_error', 'velocity']"
    ),
    "{train} --config.prior=laplace": "unknown prior 'laplace': choose one of ['dirichlet', 'gaussian']",
    "{train} --config.prior=dirichlet": "model.input 'both' ... needs the gaussian prior",
    "{train} --config.prior=dirichlet --config.model.input=raw": (
        "ancestral sampler needs the gaussian prior ... set objective.eta to 0"
    ),
    "{train} --config.time_warp=none": "unknown time warp 'none': choose one of",
    "{train} --config.optimizer.schedule=linear": (
        "unknown optimizer.schedule 'linear': choose one of ['constant', 'cosine']"
    ),
    "{train} --config.model.input=cooked": "unknown model.input 'cooked': choose one of",
    "{train} --config.model.output=skip": "unknown model.output 'skip': choose one of",
    "{train} --config.model.dtype=float16": "unknown model.dtype 'float16': choose one of ['bfloat16', 'float32']",
    "{train} --config.model.heads=5": "model.width 32 must be a multiple of twice model.heads 5",
    "{train} --config.data.name=grammar99": "unknown dataset 'grammar99'; known are ... grammar98",
    "{train} --config.data.tokenizer=grammar99": "unknown tokenizer 'grammar99'; known are ... grammar98",
    "{train} --config.data.length=32": "length 32: rows of 'grammar98' have 19 ids",
    "{train} --config.data.tokenizer=chars --config.model.vocab_size=28": "tokenizer is 'grammar98'",
    "{train} --config.teacher={missing}": "config.teacher is for distillation: the family flow has none",
    "{train} --config=experiments/grammar.py:flow_map --config.teacher={missing}": "{missing} is not a run directory",
    "{train} --config.init_from={missing}": "{missing} is not a run directory",
}

EXPERIMENTS = {
    "train --config=experiments/gramar.py": "no experiment experiments/gramar.py: did you mean experiments/grammar.py?",
    "train --config experiments/gramar.py": "no experiment experiments/gramar.py: did you mean experiments/grammar.py?",
    "train --config=nowhere": "no experiment nowhere: there are experiments/fineweb_edu.py, experiments/grammar.py, ",
    "train --config={empty}": "no experiment {empty}: there are",
    "train --config={link}": "no experiment {link}: there are",
    "train --config=experiments/head_to_head.py": "experiments/head_to_head.py has no get_config",
    "train --config={file}": "{file} cannot be loaded: SyntaxError",
    "train --config={unreadable}": "{unreadable} cannot be loaded: ",
    "train --config=experiments/quickstart.py:flowmap": "quickstart knows the arguments flow_map, ... not 'flowmap'",
    "train --config={folders}/strict.py:x": "{folders}/strict.py:x cannot be loaded: TypeError: ... takes 0 positional",
    "train --config={folders}/needy.py": "{folders}/needy.py cannot be loaded: ModuleNotFoundError: ... 'nowhere'",
    "train --config={folders}/empty.py": "get_config of {folders}/empty.py makes no ConfigDict",
    "train --config=experiments/my_text.py": "my_text takes DATA or DATA:flow_map",
    "train --config=experiments/my_text.py:{empty}": "{empty} has no manifest.json: make it with `flowlm prepare",
    "train --config=experiments/grammar.py:flow_map --workdir={new}": "give --config.teacher=RUNDIR, or ... =None",
    "train --config=experiments/grammar.py:sdtt --workdir={new}": "give --config.teacher=RUNDIR, or ... =None",
    "study --study={missing} --workdir={new} --results={new}": "no study {missing}",
    "study --study={empty} --workdir={new} --results={new}": "no study {empty}",
    "study --study=experiments/ablations.py:x --workdir={new} --results={new}": "there are the ablations ... not 'x'",
    "study --study=experiments/ablations.py:input_cpu --workdir={new} --results={new} --extra=--config.stepz=1": (
        "has no setting stepz: --config.steps=1"
    ),
    "study --study=experiments/ablations.py:input_cpu --workdir={new} --results={new} --extra=--steps=1": (
        "--steps is no flag of train: --config.steps=1"
    ),
    "study --study=experiments/test.py --workdir={new} --results={new}": "experiments/test.py has no get_study",
    "plan --config=experiments/test.py --topology=v5e:3x3": "'v5e:3x3'",
}

PLACES = {
    "train --config=experiments/test.py --workdir={file}": "{file} is a file, where a directory is wanted",
    "train --config=experiments/test.py --workdir={file}/deeper": "{file} is a file, where a directory is wanted",
    "sample {missing}": "{missing} is not a run directory ... --workdir of a `flowlm train`",
    "sample {empty}": "{empty} is not a run directory",
    "sample {file}": "{file} is not a run directory",
    "sample {link}": "{link} is not a run directory",
    "sample {unreadable}": "{unreadable} is not a run directory",
    "sample {tensors}": "make a run of it by `flowlm import {tensors} --to=DIR`",
    "sample {programs}": "{programs} holds programs, no run: `python examples/run_exported.py",
    "sample {folders}": "{folders}/config.json",
    "evaluate {missing}": "{missing} is not a run directory",
    "evaluate {file}": "{file} is not a run directory",
    "evaluate {grammar} --results={file}": "{file} is a file, where a directory is wanted",
    "compare {missing}": "{missing}",
    "compare {empty} {file}": "{empty}",
    "compare {folders}": "{folders}",
    "report {missing} --out={new}": "{missing}",
    "report {empty} --out={new}": "no run below {empty}",
    "report {file} --out={new}": "{file}",
    "report {empty} --out={file}": "{file} is a file, where a directory is wanted",
    "export {missing} --out={new}": "{missing} is not a run directory",
    "export {file} --out={new}": "{file} is not a run directory",
    "export {grammar} --out={file}": "{file} is a file, where a directory is wanted",
    "export {grammar} --out={folders}": "{folders} is not empty: give a new directory",
    "import {missing} --to={new}": "{missing}",
    "import {missing}.ckpt --to={new}": "{missing}.ckpt",
    "import {empty} --to={new}": "{empty}",
    "import {file} --to={new}": "{file}",
    "import {file} --to={file}": "{file} is a file, where a directory is wanted",
    "inspect {missing}": "there is no {missing}",
    "inspect {empty}": "{empty} is not a run directory",
    "inspect {file}": "{file} is not a run directory",
    "inspect {link}": "there is no {link}",
    "inspect {damaged}": "{damaged}",
    "{prepare} --path={missing} --tokenizer=chars": "{missing}",
    "{prepare} --path={empty} --tokenizer=chars": "{empty}",
    "{prepare} --path={file} --tokenizer={missing}.json": "{missing}.json",
    "{prepare} --path={file} --tokenizer={file}": "{file}",
    "{prepare} --path={file} --tokenizer=letters": "unknown tokenizer 'letters'; known are",
    "prepare --source=jsonl --path={file} --tokenizer=chars --length=8 --out={file}": "{file} is a file, where a",
    "study --study=experiments/ablations.py:input_cpu --workdir={new} --results={file}": "{file} is a file, where a",
    "study --study=experiments/ablations.py:input_cpu --workdir={file} --results={new}": "{file} is a file, where a",
    "bench --out={empty}": "{empty} is a directory, where a file is wanted",
    "bench --out={file}/x.json": "{file} is a file, where a directory is wanted",
}

DATA = {
    "{train} --config.data.name=text8 --config.data.tokenizer=chars --config.model.vocab_size=28": (
        "sources/text8 is missing: put text8 or text8.zip of http ... there"
    ),
    "{train} --config.data.name=lm1b --config.data.tokenizer=chars --config.model.vocab_size=28": (
        "sources/lm1b/training ... is missing: put the directory of that name of the archive"
    ),
    "{train} --config.data.name=openwebtext --config.data.tokenizer=chars --config.model.vocab_size=28": (
        "sources/openwebtext is missing: put *.jsonl files there"
    ),
    "{train} --config.data.name=openwebtext --config.data.tokenizer=gpt2 --config.model.vocab_size=50257": (
        "tokenizer 'gpt2' is not in ... /tokenizers: fetch it once by `python -c ... from_pretrained"
    ),
}
MISTAKES = COMMANDS | FLAGS | NUMBERS | SETTINGS | EXPERIMENTS | PLACES | DATA


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What may stand where something else is wanted."""
    here = tmp_path_factory.mktemp("places")
    (here / "file").write_text("neither Python nor a run\n")
    (here / "link").symlink_to(here / "nowhere")
    for name in ("empty", "tensors", "programs", "folders/config.json"):
        (here / name).mkdir(parents=True)
    (here / "folders/evaluation.json").mkdir()
    (here / "folders/strict.py").write_text("def get_config(): pass\n")
    (here / "folders/needy.py").write_text("import nowhere\n\ndef get_config(): pass\n")
    (here / "folders/empty.py").write_text("def get_config(): pass\n")
    (here / "tensors/model.safetensors").write_bytes(b"")
    (here / "programs/sampler.jax").write_bytes(b"")
    (here / "damaged.safetensors").write_bytes(b"no tensors")
    names = {name: here / name for name in ("file", "link", "empty", "tensors", "programs", "folders", "missing")}
    # A file that is there and cannot be read, by root either.
    names |= {"damaged": here / "damaged.safetensors", "unreadable": "/proc/self/mem"}
    return names | {"grammar": ROOT / "checkpoints/grammar_fmlm"}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(line, places, nothing_expensive, tmp_path):
    new = tmp_path / "new"
    named = {**places, "new": new, "train": f"train {CONFIG} --workdir={new} --config.data.dir={nothing_expensive}"}
    named["prepare"] = f"prepare --source=textfiles --length=8 --out={new}"
    ended = flowlm(*shlex.split(line.format(**named)))
    said = [text for text in ended.err.splitlines() if not re.match(r"[WI]\d{4} ", text)]  # what libraries log
    assert ended.status in (1, 2) and len(said) == 1 and said[0].startswith("flowlm: "), ended
    assert "Traceback" not in said[0] and len(re.findall(r"[.?!] [A-Z]", said[0])) < 2
    rest = said[0]
    for part in MISTAKES[line].format(**named).split(" ... "):
        assert part in rest, said[0]
        rest = rest.partition(part)[2]
    assert not new.exists()


def test_the_table_is_as_long_as_it_is_meant_to_be():
    assert len(MISTAKES) > 120


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "did you mean train?"),
        (["train", CONFIG, "--workdir=/nowhere", "--config.stepz=7"], "no setting stepz: --config.steps=7"),
    ],
)
def test_from_outside(arguments, expected):
    """An exit status that scripts see, one line that people read."""
    command = [sys.executable, "-m", "flowlm", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("flowlm: ") and expected in line


def test_help_and_mistyped_flags_do_not_wait_for_jax():
    """Importing it takes seconds."""
    code = """
import contextlib, sys
from flowlm import main
for line in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        main.read_call(["flowlm", *line.split()])
assert "jax" not in sys.modules
"""
    lines = ["--help", "--version", "sample --help", "bench --help", "trian", "sample --stepz=1", "inspect"]
    subprocess.run([sys.executable, "-c", code, *lines], cwd=ROOT, capture_output=True, check=True)


# --- run directories ---------------------------------------------------------------------------------------------


def test_a_directory_of_another_experiment(nothing_expensive, tmp_path):
    """Names what differs; settings that may change do not count."""
    held = run_config("", **{"optimizer.learning_rate": 0.5, "seed": 3, "log_every": 7})
    run_directory.prepare_workdir(tmp_path, held, shipped("grammar98"))
    before = (tmp_path / "config.json").read_text()
    (tmp_path / "experiment.py").write_text("from toy import run_config\ndef get_config(): return run_config('')\n")
    message = error_of("train", f"--config={tmp_path}/experiment.py", f"--workdir={tmp_path}")
    assert "2 settings differ: optimizer.learning_rate = 0.5 there, 0.001 here, seed = 3 there, 0 here" in message
    assert (tmp_path / "config.json").read_text() == before


def test_a_run_without_checkpoints(data_dir, tmp_path):
    run_directory.prepare_workdir(tmp_path, run_config(data_dir), shipped("grammar98"))
    assert "no checkpoints under" in error_of("sample", f"--checkpoint={tmp_path}")
    (tmp_path / "checkpoints").mkdir()
    assert "no complete checkpoint yet" in error_of("sample", f"--checkpoint={tmp_path}")
    assert "no complete checkpoint yet" in error_of("evaluate", f"--checkpoint={tmp_path}")


def test_samplers_are_refused_before_parameters_are_read(tmp_path):
    """By the settings alone: here there is nothing else."""
    for family in ("flow", "autoregressive"):
        run_directory.prepare_workdir(tmp_path / family, run_config("", family), shipped("grammar98"))
    out = f"--out={tmp_path}/out"
    for line, said in {
        ("sample", "flow", "--sampler=eulr"): "no sampler 'eulr': there are euler, ancestral",
        ("export", "flow", "--sampler=eulr", "--format=jax", "--steps=2", out): "no sampler 'eulr'",
        ("sample", "autoregressive", "--steps=3"): "takes 18 steps, got 3",
        ("evaluate", "autoregressive", "--steps=3"): "takes 18 steps, got 3",
        ("export", "autoregressive", "--format=jax", "--steps=3", out): "takes 18 steps, got 3",
    }.items():
        command, family, *flags = line
        assert said in error_of(command, f"{tmp_path / family}", *flags), line
    assert "no checkpoints under" in error_of("sample", f"{tmp_path / 'flow'}", "--sampler=euler")


def test_sampling_takes_a_step():
    config = run_config("")
    experiment = assembly.build(config, 99)
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        experiment.family.sample(experiment.net, {"embedding": jnp.zeros((99, 32))}, jax.random.key(0), 4, 0)
