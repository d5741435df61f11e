"""The paper's ablations (2602.16813, with the objectives of 2604.09784 and 2602.12233), each a sweep and a table of its own.

    flowlm study --study=experiments/ablations.py:NAME_cpu --workdir=DIR --results=DIR2     2 CPU cores, on the grammar
    flowlm study --study=experiments/ablations.py:NAME --workdir=DIR --results=DIR2         LM1B at the paper's size, not run

On the CPU a flow takes 4 minutes and a flow map 5 to 12; sweeps in one --workdir share the first flow. Without the time warp a flow
writes .09 grammatical rows where it has .39 with it: docs/results/ablations.md. `loss=velocity` is a weight, not another network.
"""

import dataclasses
from collections.abc import Mapping

from flowlm.studies.study import Run, Study
from flowlm.studies.sweeps import Point, chain, product, runs, sweep, zipped

SEEDS, ONE = (0, 1, 2), (0,)  # what the headline hangs on has three


@dataclasses.dataclass(frozen=True)
class Size:
    """experiment: of the flow, and with `:flow_map` of its flow map; flow, short, student: settings of the teacher, of a flow
    and of a flow map in a sweep; metrics: of the table; vocabularies: where vocabularies are compared, on what, and which."""

    experiment: str
    flow: Mapping[str, object]
    short: Mapping[str, object]
    student: Mapping[str, object]
    metrics: tuple[str, ...]
    vocabularies: tuple[str, list[Point], Mapping[str, object], tuple[str, ...]]


def vocabularies(sizes: Mapping[str, int]) -> list[Point]:
    """A point for each tokenizer: it and its size."""
    return zipped(sweep("data.tokenizer", sizes), sweep("model.vocab_size", sizes.values()))


ONCE = {"evaluation.every": 0}
TEXT = ("nats_per_char", "entropy", "distinct_2", "ngram_distance_2")
FEW = {"objective.target": "psd", "objective.noise_scale": 1.0, "evaluation.steps": (1, 2, 4, 8)}
CPU = Size(
    "experiments/grammar.py",
    ONCE,
    ONCE | {"steps": 1200, "evaluation.steps": (1, 8, 64), "evaluation.final_samples": 1024},
    ONCE | FEW | {"steps": 1500, "evaluation.final_samples": 1024},
    ("grammatical", "nll_minus_entropy", "distinct_rows", "entropy"),
    (
        "experiments/speeches.py",
        vocabularies({"sotu_letters_112": 112, "sotu_bpe_512": 512, "sotu_bpe_1024": 1024, "sotu_bpe_4096": 4096}),
        ONCE | {"steps": 1200},
        TEXT,
    ),
)
JUDGED = ONCE | {"evaluation.language_models": ("hf:gpt2-large",)}
PAPER = Size(
    "experiments/lm1b.py",
    JUDGED,
    JUDGED,
    JUDGED | FEW,
    ("gpt2_large_nats_per_token", "entropy", "distinct_2"),
    ("experiments/lm1b.py", vocabularies({"bert-base-uncased": 30_522, "gpt2": 50_257}), JUDGED, TEXT),
)

# Both priors can do only what the Dirichlet prior can.
EITHER_PRIOR = {"model.input": "scaled", "objective.eta": 0.0}
FLOWS = {
    "time_warp": {SEEDS: sweep("time_warp", ("ambient", "identity")), ONE: sweep("time_warp", ("embedded",))},
    "loss": {ONE: sweep("objective.loss", ("cross_entropy", "squared_error", "velocity"))},
    "prior": {ONE: product(sweep("prior", ("gaussian", "dirichlet")), [EITHER_PRIOR])},
    "input": {
        SEEDS: sweep("model.input", ("raw", "posterior", "both")),
        ONE: sweep("model.input", ("scaled", "white")),
    },
    "soft_caps": {ONE: product(sweep("model.attention_cap", (0.0, 50.0)), sweep("model.logit_cap", (0.0, 30.0)))},
    "ema": {ONE: sweep("ema_decay", (0.0, 0.9, 0.99, 0.999, 0.9999))},
}
# The Eulerian target in logit space is singular at t = 1.
MORE_TARGETS = chain(
    sweep("objective.target", ("teacher_steps", "csd", "ecld", "lsd_logit")),
    [{"objective.target": "esd_logit", "objective.tau_max": 0.99}],
)
FLOW_MAPS = {
    "target": {SEEDS: sweep("objective.target", ("psd", "lsd", "esd")), ONE: MORE_TARGETS},
    "squared_error": {ONE: sweep("objective.target", ("psd", "psd_squared"))},
    "teacher": {SEEDS: [{"objective.target": "psd"}, {"objective.target": "psd", "teacher": None}]},
    "diagonal": {ONE: sweep("objective.diagonal", (0.0, 0.25, 0.5, 0.75))},
    "boundary": {ONE: sweep("objective.boundary", (0.0, 1 / 32, 0.25))},
    "cut": {ONE: sweep("objective.cut", ("midpoint", "uniform"))},
}
NAMES = (*FLOWS, "vocabulary", *FLOW_MAPS, "gamma")


def points(by_seeds: Mapping[tuple[int, ...], list[Point]], *where: object) -> list[Run]:
    """The runs of an ablation whose points have seeds of their own; `where`: further arguments of `runs`."""
    return [run for seeds, sweep in by_seeds.items() for run in runs(sweep, *where, seeds=seeds)]


def get_study(arg: str = "") -> Study:
    """`arg` is one of NAMES, with `_cpu` behind it for the small size."""
    name = arg.removesuffix("_cpu")
    size = PAPER if name == arg else CPU
    if name in FLOWS:
        return Study(points(FLOWS[name], size.experiment, size.short), size.metrics)
    if name == "vocabulary":
        experiment, sizes, settings, metrics = size.vocabularies
        return Study(runs(sizes, experiment, settings), metrics)
    if name in FLOW_MAPS:
        students = points(FLOW_MAPS[name], f"{size.experiment}:flow_map", size.student, "flow")
    elif name == "gamma":
        renoised = tuple(sweep("gamma", (0.4, 0.8, 1.0)))
        students = [Run("flow_map", f"{size.experiment}:flow_map", size.student, "flow", ONE, renoised)]
    else:
        raise ValueError(f"there are the ablations {', '.join(NAMES)}, each also with _cpu, not {arg!r}")
    return Study([Run("flow", size.experiment, size.flow), *students], size.metrics)
