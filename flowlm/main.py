"""The one command.

flowlm train --config=experiments/NAME.py[:arg] [--config.path.to.key=value ...] --workdir=DIR
             [--distributed] [--profile_steps=a:b] [--compile_cache=DIR]
flowlm sample --checkpoint=DIR --steps=N [--num=N] [--sampler=NAME] [--seed=N] [--objective=KEY=VALUE,...]
flowlm evaluate --checkpoint=DIR [--steps=N,N,...] [--num=N] [--objective=KEY=VALUE,... --results=DIR] [--samples_only]
                [--data_dir=DIR]
flowlm plan --config=experiments/NAME.py[:arg] --topology=v5e:4x4,... [--per_chip=N] [--nolargest] [--dense] [--results=DIR]
flowlm plan --config=experiments/NAME.py[:arg] --device
flowlm bench [--device] [--help]
flowlm compare --runs=DIR,DIR,...
flowlm prepare judge [--data_dir=DIR]
flowlm export DIR --out=DIR --format=params|safetensors|jax [--dtype=float32|bfloat16] [--steps=N [--sampler=NAME]]
flowlm import CKPT --to=DIR [--weights=ema|live] [--config=experiments/NAME.py]
flowlm inspect PATH
flowlm prepare --source=textfiles|jsonl --path=FILE_OR_DIR --tokenizer=NAME --length=N --out=DIR [--text_key=NAME]
flowlm report DIR DIR ... --out=DIR
flowlm study --study=experiments/study.py|ablations.py[:arg] --workdir=DIR --results=DIR [--extra=FLAG,FLAG,...]
             [--parallel=N] [--dry_run]
"""

import ast
import difflib
import itertools
import os
import re
import sys
import traceback
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from flowlm import open_files, overrides
from flowlm.terminal import replace_what_cannot_be_printed

FLAGS = flags.FLAGS
overrides.register()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "train, plan: the experiment, and --config.key=value to change it"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "train: the run directory; a run found there is taken up again")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "train: one of several processes; only needed where JAX does not find the others itself"
)
_PROFILE_STEPS = flags.DEFINE_string("profile_steps", "", "train: a:b traces steps a to b - 1 into WORKDIR/profile")
_COMPILE_CACHE = flags.DEFINE_string("compile_cache", None, "train: directory of compiled programs, for later starts")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "sample, evaluate: the directory of a trained run")
_RUNS = flags.DEFINE_list("runs", None, "compare: directories of evaluated runs")
_OBJECTIVE = flags.DEFINE_list(
    "objective", [], "sample, evaluate: settings in place of the run's, as temperature=0.8,gamma=1"
)
_STUDY = flags.DEFINE_string("study", None, "study: the file that lists its runs, with an argument behind a colon")
_RESULTS = flags.DEFINE_string(
    "results", None, "study, plan, evaluate: where the results go (evaluate: in place of the run's directory)"
)
_EXTRA = flags.DEFINE(
    overrides.FlagsParser(), "extra", None, "study: flags that are handed to every run, such as --config.steps=10"
)
_PARALLEL = flags.DEFINE_integer("parallel", 1, "study: runs at a time, each on its own share of the cores", 1)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "study: print the command lines of what is left and do nothing")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "~/.cache/flowlm", "prepare: the experiments' data.dir; evaluate: where the data lies now"
)
_SOURCE = flags.DEFINE_string("source", None, "prepare: textfiles (a document a file) or jsonl (a document a line)")
_PATH = flags.DEFINE_string("path", None, "prepare: the file or the folder with the text")
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "prepare: the key of a document's text in a line of jsonl")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "prepare: name of a tokenizer or path of its file")
_LENGTH = flags.DEFINE_integer("length", None, "prepare: ids in a row", 2)
_OUT = flags.DEFINE_string("out", None, "prepare, report: the folder to make")
_SAMPLES_ONLY = flags.DEFINE_boolean(
    "samples_only",
    False,
    "evaluate: the sampler as it is set; no plain one beside it, no likelihood, no rows of reference",
)
_STEPS = flags.DEFINE_list("steps", None, "sample: network calls (default 64); evaluate: a list of them")
_NUM = flags.DEFINE_integer("num", None, "sample: how many (default 8); evaluate: samples for each number of steps", 1)
_SAMPLER = flags.DEFINE_string("sampler", None, "sample: one of the family's samplers (default: its last)")
_SEED = flags.DEFINE_integer("seed", 0, "sample: the seed", 0, 2**32 - 1)
_TOPOLOGY = flags.DEFINE_list("topology", None, "plan: TPU slices as CHIP:SHAPE, or CHIP:SHAPE:SLICES for several")
_PER_CHIP = flags.DEFINE_integer(
    "per_chip", None, "plan: sequences on each chip, in place of config.batch_size over all", 1
)
_LARGEST = flags.DEFINE_bool("largest", True, "plan: also search the largest batch that fits")
_DENSE = flags.DEFINE_bool("dense", False, "plan: compile also the step written over the whole vocabulary")
_DEVICE = flags.DEFINE_bool("device", False, "plan: the largest batch that fits on the devices at hand")
_FORMAT = flags.DEFINE_enum("format", "params", ["params", "safetensors", "jax"], "export: what is written")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "export: of the parameters in the files")
_TO = flags.DEFINE_string("to", None, "import: a new run directory")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "live"], "import, inspect: which parameters of a .ckpt")


def _train() -> None:
    from flowlm import processes
    from flowlm.profiling import parse_steps
    from flowlm.train import train

    if _CONFIG.value is None or _WORKDIR.value is None:
        raise ValueError("flowlm train needs --config=experiments/NAME.py and --workdir=DIR")
    profile_steps = parse_steps(_PROFILE_STEPS.value)
    if _COMPILE_CACHE.value:
        jax.config.update("jax_compilation_cache_dir", _COMPILE_CACHE.value)
    processes.start(_DISTRIBUTED.value)
    train(_CONFIG.value, _WORKDIR.value, profile_steps)


def _step_counts(default: list[str]) -> list[int]:
    counts = _STEPS.value or default
    if not all(c.isdigit() and int(c) > 0 for c in counts):
        raise ValueError(f"--steps takes positive whole numbers, got {','.join(counts)!r}")
    return [int(c) for c in counts]


def _objective() -> dict[str, object]:
    changes = {}
    for change in _OBJECTIVE.value:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--objective takes KEY=VALUE,..., got {change!r}")
        try:
            changes[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[key] = value
    return changes


def _sample() -> None:
    from flowlm.evaluation import Sampler, named_sampler
    from flowlm.experiment import load_trained
    from flowlm.sharding import Layout, make_mesh

    if _CHECKPOINT.value is None:
        raise ValueError("flowlm sample needs --checkpoint=DIR, the directory of a trained run")
    counts, num = _step_counts(["64"]), _NUM.value or 8
    layout = Layout(make_mesh(), fsdp=True)
    run = load_trained(_CHECKPOINT.value, layout, _objective())
    name, family = named_sampler(run.experiment.family, _SAMPLER.value)
    for steps in counts:
        draw = Sampler(run.experiment.net, family, steps, layout)
        print(f"== {name}@{steps}")
        for row in draw(run.params, jax.random.key(_SEED.value), num):
            print(run.tokenizer.decode(row))


def _evaluate() -> None:
    from flowlm import run_directory, storage
    from flowlm.data import open_dataset
    from flowlm.evaluation import Evaluator
    from flowlm.experiment import load_trained
    from flowlm.sharding import Layout, make_mesh

    if _CHECKPOINT.value is None:
        raise ValueError("flowlm evaluate needs --checkpoint=DIR, the directory of a trained run")
    if (_OBJECTIVE.value or _SAMPLES_ONLY.value) and not _RESULTS.value:
        raise ValueError(
            "--objective and --samples_only change what is evaluated: give --results=DIR, so that the run keeps its own results"
        )
    layout = Layout(make_mesh(), fsdp=True)
    run = load_trained(_CHECKPOINT.value, layout, _objective())
    storage.check_writable(storage.path(_RESULTS.value or _CHECKPOINT.value))
    data, settings = run.config.data, run.config.evaluation
    counts = _step_counts([str(n) for n in settings.steps])
    before = run_directory.known_content(_CHECKPOINT.value, run.config, "data.dir")
    if FLAGS["data_dir"].present:
        data.dir = _DATA_DIR.value
    if before not in (None, run_directory.content_of_data(run.config)):
        print(f"the data in {data.dir} is not what {_CHECKPOINT.value} was trained on", file=sys.stderr)
    # The run's own tokenizer, since the one that its settings name may have moved with the data.
    own = str(storage.path(_CHECKPOINT.value) / "tokenizer.json")
    dataset = open_dataset(data.name, own, data.length, data.dir)
    only = _SAMPLES_ONLY.value
    evaluator = Evaluator(run.experiment, dataset, layout, run.config.seed, settings, data.dir, counts, only)
    result = evaluator(run.params, run.step, _NUM.value or settings.final_samples)
    result.save(_RESULTS.value or _CHECKPOINT.value)
    result.show()


def _compare() -> None:
    from flowlm.results import compare

    if not _RUNS.value:
        raise ValueError("flowlm compare needs --runs=DIR,DIR, directories of evaluated runs")
    compare(_RUNS.value)


def _plan() -> None:
    from flowlm.plan import plan, plan_device

    if _CONFIG.value is None or bool(_TOPOLOGY.value) == _DEVICE.value:
        raise ValueError("flowlm plan needs --config=experiments/NAME.py and either --topology=v5e:4x4,... or --device")
    if _DEVICE.value:
        plan_device(_CONFIG.value)
    else:
        plan(_CONFIG.value, _TOPOLOGY.value, _RESULTS.value, _PER_CHIP.value, _LARGEST.value, _DENSE.value)


def _prepare() -> None:
    from flowlm.data.prepare import prepare

    wanted = _SOURCE.value, _PATH.value, _TOKENIZER.value, _LENGTH.value, _OUT.value
    if None in wanted:
        raise ValueError("flowlm prepare needs --source, --path, --tokenizer, --length and --out (or the word judge)")
    manifest = prepare(*wanted, _DATA_DIR.value, _TEXT_KEY.value)
    if manifest.get("left_out", {}).get("files"):
        left_out = manifest["left_out"]
        print(f"left out: {left_out['files']} other files, such as {', '.join(left_out['such_as'])}")
    for split, rows in manifest["rows"].items():
        print(f"{split}: {manifest['documents'][split]} documents, {rows} rows of {manifest['length']}")
    print(f"flowlm train --config=experiments/own_text.py:{_OUT.value} --workdir=DIR")


def _prepare_judge() -> None:
    from flowlm.judges import smollm2

    print(smollm2.prepare(_DATA_DIR.value))


def _study() -> None:
    from flowlm import storage
    from flowlm.carry_out import carry_out
    from flowlm.study import commands, load

    if None in (_STUDY.value, _WORKDIR.value, _RESULTS.value):
        raise ValueError("flowlm study needs --study=experiments/study.py, --workdir=DIR and --results=DIR")
    study, workdir, extra = load(_STUDY.value), storage.path(_WORKDIR.value), _EXTRA.value or []
    if _DRY_RUN.value:
        for line in commands(study, workdir, extra, Path(_RESULTS.value)):
            print(line)
    else:
        carry_out(study, workdir, Path(_RESULTS.value), extra, _PARALLEL.value)


def _report(*folders: str) -> None:
    from flowlm.report import write

    if not folders or _OUT.value is None:
        raise ValueError("flowlm report needs folders with runs in them and --out=DIR")
    write(folders, _OUT.value)


def _export(path: str) -> None:
    from flowlm.export import export
    from flowlm.sharding import Layout, make_mesh

    if _OUT.value is None:
        raise ValueError("flowlm export needs --out=DIR, a new directory")
    steps = None if _STEPS.value is None else _step_counts([])
    if steps is not None and len(steps) != 1:
        raise ValueError("flowlm export takes one number of --steps")
    export(
        path,
        _OUT.value,
        Layout(make_mesh(), fsdp=True),
        format=_FORMAT.value,
        dtype=_DTYPE.value,
        steps=steps and steps[0],
        sampler=_SAMPLER.value,
        objective=_objective(),
    )
    print(f"{_FORMAT.value} of {path} in {_OUT.value}")


def _bench(*arguments: str) -> None:
    from flowlm import bench

    bench.main([*arguments])


def _import(path: str) -> None:
    from flowlm.importing import import_run

    if _TO.value is None:
        raise ValueError("flowlm import needs --to=DIR, a new run directory")
    run = import_run(path, _TO.value, _WEIGHTS.value, _CONFIG.value)
    print(f"{run.config.objective.family} of {path} at step {run.step} in {_TO.value}")
    if run.config.data.tokenizer == "none":
        print("its tokenizer is not known: tokens are written as numbers; name an experiment with --config to have its")


def _inspect(path: str) -> None:
    from flowlm.inspection import inspect, show
    from flowlm.sharding import Layout, make_mesh

    show(inspect(path, Layout(make_mesh(), fsdp=True), _WEIGHTS.value))


COMMANDS = {
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
    "compare": _compare,
    "plan": _plan,
    "study": _study,
    "prepare": _prepare,
    "prepare judge": _prepare_judge,
}
# Commands that take places behind their name: any number, or one; bench has flags of its own, some of the same names.
PLACED = {"report": _report, "export": _export, "import": _import, "inspect": _inspect, "bench": _bench}


def _check_experiment(argv: list[str]) -> None:
    """Names the experiments there are when the one asked for is not there; absl would show a stack of frames."""
    for argument, following in itertools.pairwise([*argv, ""]):
        if found := re.fullmatch(r"--?config(=.*)?", argument):
            path = Path((found[1] or f"={following}")[1:].partition(":")[0])
            if not path.is_file():
                known = sorted(str(p) for p in Path("experiments").glob("*.py"))
                close = difflib.get_close_matches(str(path), known, 1)
                hint = (
                    f"did you mean {close[0]}?"
                    if close
                    else f"there are {', '.join(known) or 'none here: run from a checkout'}"
                )
                raise ValueError(f"no experiment {path}: {hint}")


def _parse(argv: list[str]) -> list[str]:
    if argv[1:2] == ["bench"]:
        return [*FLAGS(argv[:2]), *argv[2:]]
    try:
        _check_experiment(argv)
        return FLAGS(argv)
    except (flags.Error, ValueError, KeyError, AttributeError, TypeError) as error:
        # A KeyError shows the repr of its message, at times a repr of a repr: every line break and quote is escaped.
        message = str(error.args[0] if error.args else error).replace("\\n", " ")
        sys.exit("flowlm: " + " ".join(re.sub(r"[\\']", "", message).strip('"').split()))


def _main(argv: list[str]) -> None:
    name, places = " ".join(argv[1:]), []
    if argv[1:2] and argv[1] in PLACED:
        name, places = argv[1], argv[2:]
    if name not in COMMANDS | PLACED:
        sys.exit(f"flowlm: expected one of {', '.join(COMMANDS | PLACED)}, got {name or 'nothing'}\n{__doc__}")
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # at INFO every save tells a long story
    try:
        _check_outputs()
        (COMMANDS | PLACED)[name](*places)
    except (ValueError, OSError, FloatingPointError, ImportError, RuntimeError) as error:
        logging.debug("%s", traceback.format_exc())  # --verbosity=1 shows it
        told = error
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            told = f"{os.fspath(error.filename)}: {error.strerror}"  # without its number
        sys.exit(f"flowlm: {told}")


def _check_outputs() -> None:
    """Raises ValueError where results are to go to a place that cannot be written, before they are made."""
    from flowlm import storage

    for flag in (_OUT, _RESULTS, _TO):
        if flag.value is not None:
            storage.check_writable(storage.path(flag.value))


def run() -> None:
    """Entry point of the `flowlm` console script."""
    replace_what_cannot_be_printed()
    open_files.raise_limit()
    app.run(_main, flags_parser=_parse)


if __name__ == "__main__":
    run()
