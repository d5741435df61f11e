"""The head-to-head: every method on one network, data, optimizer and budget, judged alike.

    bash launch/study.sh grammar        or    flowlm study --study=experiments/study.py:grammar --workdir=DIR --results=DIR

`grammar`: 3,600 steps of training from data for every method and 4,500 of distillation, about 5 hours on 2 CPU cores, resumable
at any point. Discrete students go through rounds of equal length, each with twice the jump of the last; every round is a row of
the table, so that the best one at each number of steps can be read off. The study has not been carried out yet.
"""

from flowlm.study import Run, Study

SEEDS = (0, 1, 2)
ALL_STEPS = "1,2,4,8,16,32,64,128"
FEW_STEPS = "1,2,4,8"
ROUNDS = 5
GRAMMAR = "experiments/grammar.py"


def rounds(student: str, teacher: str) -> list[Run]:
    """Runs that distil `teacher` by steps twice as long in each: jumps 1/32, 1/16, .. 1/2, in 4,500 steps altogether.

    A run is named after the number of its jumps from noise to data.
    ."""
    runs = []
    for i in range(ROUNDS):
        jump = 2.0 ** (i - ROUNDS)
        settings = {"steps": 4500 // ROUNDS, "objective.jump": jump, "evaluation.steps": FEW_STEPS}
        name = f"{student}_{round(1 / jump)}"
        runs.append(Run(name, f"{GRAMMAR}:{student}", settings, teacher, SEEDS))
        teacher = name
    return runs


def get_study(arg: str = "grammar") -> Study:
    """`arg` is `grammar`."""
    if arg != "grammar":
        raise ValueError(f"the study knows the argument grammar, not {arg!r}")
    many = {"evaluation.steps": ALL_STEPS, "evaluation.every": 100_000}
    runs = [
        Run("autoregressive", f"{GRAMMAR}:autoregressive", {"evaluation.every": 100_000}),
        Run("masked", f"{GRAMMAR}:masked", many),
        Run("uniform", f"{GRAMMAR}:uniform", many | {"objective.curriculum_steps": 1800}),
        Run("flow", GRAMMAR, many),
        Run("flow_map", f"{GRAMMAR}:flow_map", {"evaluation.steps": FEW_STEPS}, "flow", SEEDS),
        *rounds("sdtt", "masked"),
        *rounds("dcd", "uniform"),
    ]
    shown = ("grammatical", "nll_minus_entropy", "distinct_rows", "entropy", "ngram_distance_1", "ngram_distance_2")
    return Study(runs, shown)
