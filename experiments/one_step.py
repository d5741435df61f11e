"""What one step lacks, and what closes it: studies from the flow map of the grammar that is in the repository.

    flowlm study --study=experiments/one_step.py:lacks --workdir=DIR --results=DIR2 --parallel=2     or :forms, :budget

Half an hour on 2 CPU cores: can four blocks hold a map of one step, does longer training find it, what does matching the law do?
Two hours for the forms of matching, eight for its budget at 4, 8 and 12 blocks. In one step the map writes .19 grammatical rows and
from noise that it has learnt by heart .64: docs/results/one_step.md.
"""

from flowlm.studies.study import Run, Study

GRAMMAR = "experiments/grammar.py"
# The flow that is followed is the map's own denoiser, because the checkpoint came without its flow.
SHIPPED = {"teacher": "checkpoints/grammar_fmlm", "objective.noise_scale": 1.0, "evaluation.every": 0}
ONE = {"evaluation.steps": (1,)}
ENDS = ONE | {"objective.target": "teacher_steps", "objective.teacher_steps": 16, "objective.diagonal": 0.0}
ENDS |= {"objective.boundary": 1.0, "ema_decay": 0.99}
MATCHED = {"objective.flow": "diagonal", "evaluation.steps": (1, 2, 4, 8)}
METRICS = ("grammatical", "nll_minus_entropy", "distinct_rows", "ngram_distance_2")


def lacks() -> Study:
    """The ends of the flow's trajectories learnt from a fixed number of draws of noise, and from fresh ones; and the law."""
    runs = [
        Run(
            f"ends_of_{noises or 'fresh'}",
            f"{GRAMMAR}:flow_map",
            SHIPPED | ENDS | {"objective.noises": noises, "steps": steps},
        )
        for noises, steps in ((4096, 400), (32_768, 400), (0, 400))
    ]
    runs.append(Run("ends_of_fresh_4x", f"{GRAMMAR}:flow_map", SHIPPED | ENDS | {"steps": 1600}))
    runs.append(Run("matched", f"{GRAMMAR}:matched", SHIPPED | MATCHED))
    return Study(runs, METRICS)


def forms() -> Study:
    """The forms of the student's loss."""
    names = ("both", "ratio", "logit", "log", "probability")
    settings = SHIPPED | MATCHED
    return Study([Run(form, f"{GRAMMAR}:matched", settings | {"objective.form": form}) for form in names], METRICS)


def budget() -> Study:
    """Distribution matching by budget and depth."""
    runs = [
        Run(
            f"{blocks}_blocks_{steps}",
            f"{GRAMMAR}:matched",
            SHIPPED | MATCHED | {"model.blocks": blocks, "steps": steps},
        )
        for blocks in (4, 8, 12)
        for steps in (750, 3000, 12_000)
    ]
    return Study(runs, METRICS)


def get_study(arg: str = "lacks") -> Study:
    """`arg` is `lacks`, `forms` or `budget`."""
    studies = {each.__name__: each for each in (lacks, forms, budget)}
    if arg not in studies:
        raise ValueError(f"there are the studies {', '.join(studies)}, not {arg!r}")
    return studies[arg]()
