"""The head-to-head: every method on one network, data, optimizer and budget, judged alike; three seeds of teacher and student.

    bash launch/study.sh grammar        or    flowlm study --study=experiments/head_to_head.py:grammar --workdir=DIR --results=DIR
    bash launch/study.sh text           needs the judge: pip install -e .[judge], then flowlm prepare judge
    bash launch/study.sh tuning         what was tried beside; give it the WORKDIR of grammar, and text_tuning that of text

8 hours on 2 CPU cores, 20 minutes on a card with 16 cores; all go on where they were. One step of the flow map writes .21
grammatical rows: docs/results/head_to_head.md, with how students' rounds are named. `text_gpu`, on LM1B, needs a card.
"""

import dataclasses

from flowlm.studies.study import Run, Study

SEEDS = (0, 1, 2)
ROUNDS = 5
GRAMMAR, SPEECHES, LM1B = (f"experiments/{name}.py" for name in ("grammar", "speeches", "lm1b_gpu"))
BELOW = (0.0, 0.15)  # a sample may be as much less diverse than real text
ONCE = {"evaluation.every": 0}
# Knobs of samplers that draw tokens, on the grammar; `greedy` takes the likeliest ones in the last step.
DRAWN = (*({"temperature": t} for t in (0.8, 0.6, 0.45)), {"greedy": True})


def rounds(
    config: str,
    student: str,
    teacher: str,
    steps: int,
    settings: dict,
    *,
    last: dict | None = None,
    count: int = ROUNDS,
    suffix: str = "",
    seeds: tuple[int, ...] = SEEDS,
    sweep: tuple = (),
    needs: tuple = (),
) -> list[Run]:
    """`count` runs of `steps` each that distil `teacher` by steps twice as long in each: jumps 1/32, 1/16, .. 1/2.

    A run is named after the number of its jumps from noise to data. `last`: settings of the last round in place of `settings`.
    """
    runs = []
    for i in range(count):
        jump = 2.0 ** (i - ROUNDS)
        name = f"{student}_{round(1 / jump)}{suffix}"
        mine = last if last and i == count - 1 else settings
        more = {"steps": steps, "objective.jump": jump}
        drawn = i == ROUNDS - 1 or (
            bool(suffix) and i == 2
        )  # the ends of all five rounds, and of the three that share all steps
        runs.append(Run(name, f"{config}:{student}", mine | more, teacher, seeds, sweep, needs, drawn))
        teacher = name
    return runs


def distilled(config: str, student: str, teacher: str, steps: int, settings: dict, *, last: dict, **more) -> list[Run]:
    """Rounds of `steps` in all to jumps of 1/2, and rounds of as many in all that end at 1/32 (one) and at 1/8 (three)."""
    runs = rounds(config, student, teacher, steps // ROUNDS, settings, last=last, **more)
    for count in (1, 3):
        suffix = f"_to{2 ** (ROUNDS + 1 - count)}"
        *way, end = rounds(config, student, teacher, steps // count, settings, count=count, suffix=suffix, **more)
        runs += [*(dataclasses.replace(run, sweep=(), listed=False) for run in way), end]
    return runs


def grammar() -> Study:
    many, few = ONCE | {"evaluation.steps": (1, 2, 4, 8, 16, 32, 64, 128)}, ONCE | {"evaluation.steps": (1, 2, 4, 8)}
    # The flow's sampler is the ancestral one with all of the noise, its map's the plain one with half of it.
    flown = (*({"noise_scale": scale} for scale in (0.8, 0.65, 0.5)), {"temperature": 0.7})
    mapped = tuple({"noise_scale": scale} for scale in (0.8, 0.65, 0.35))
    runs = [
        Run("autoregressive", f"{GRAMMAR}:autoregressive", ONCE, sweep=DRAWN[:3]),
        Run("masked", f"{GRAMMAR}:masked", many, None, SEEDS, DRAWN),
        Run("uniform", f"{GRAMMAR}:uniform", many, None, SEEDS, DRAWN),
        Run("flow", GRAMMAR, many, None, SEEDS, flown),
        Run("flow_map", f"{GRAMMAR}:flow_map", many, "flow", SEEDS, mapped),
        Run("matched", f"{GRAMMAR}:matched", many, "flow_map", SEEDS, mapped),
        Run("matched_masked", f"{GRAMMAR}:matched_masked", many, "masked", SEEDS, DRAWN),
        Run("matched_uniform", f"{GRAMMAR}:matched_uniform", many, "uniform", SEEDS, DRAWN),
        *distilled(GRAMMAR, "sdtt", "masked", 4500, few, last=many, sweep=DRAWN),
        *distilled(GRAMMAR, "dcd", "uniform", 4500, few, last=many, sweep=DRAWN),
    ]
    shown = ("grammatical", "nll_minus_entropy", "distinct_rows", "entropy", "ngram_distance_1", "ngram_distance_2")
    matched = ("grammatical", "ngram_distance_2", "distinct_rows")
    return Study(runs, (*shown, "bound_nats_per_token"), matched, (0.75, 1.5), "nll_minus_entropy")


def tuning() -> Study:
    """What was tried beside the runs of `grammar`, whose directories it shares: for the baselines, and for a map in one step."""
    rate, short = "optimizer.learning_rate", ONCE | {"steps": 1200, "evaluation.final_samples": 1024}
    trained, students = short | {"evaluation.steps": (8, 64)}, short | {"evaluation.steps": (8,)}
    curriculum = {"objective.curriculum_steps": 600}
    own = ["masked", "uniform", "flow", "sdtt_32", "sdtt_16", "sdtt_8", "dcd_32", "dcd_16", "dcd_8"]
    runs = [dataclasses.replace(run, seeds=(0,), sweep=()) for run in grammar().runs if run.name in own]
    for value in (1e-3, 2e-3, 4e-3):
        runs.append(Run(f"masked_rate{value:g}", f"{GRAMMAR}:masked", trained | {rate: value}))
        runs.append(Run(f"uniform_rate{value:g}", f"{GRAMMAR}:uniform", trained | curriculum | {rate: value}))
    runs.append(Run("uniform_no_curriculum", f"{GRAMMAR}:uniform", trained))
    for student, teacher in (("sdtt", "masked"), ("dcd", "uniform")):
        for value in (3e-4, 3e-3):
            more = {"count": 3, "suffix": f"_rate{value:g}", "seeds": (0,)}
            runs += rounds(GRAMMAR, student, teacher, 900, students | {rate: value}, **more)
    mapped, deep = short | {"steps": 1500, "evaluation.steps": (1, 2, 4, 8)}, {"model.blocks": 8}
    student = f"{GRAMMAR}:flow_map"
    runs += [
        Run("flow_map_1500", student, mapped, "flow"),
        Run("flow_map_sharpened", student, mapped | {"objective.teacher_temperature": 0.7}, "flow"),
        Run("flow_8_blocks", GRAMMAR, trained | deep | {"steps": 3600, "evaluation.steps": (1, 8, 64)}),
        Run("flow_map_8_blocks", student, mapped | deep, "flow_8_blocks"),
    ]
    return Study(runs, ("grammatical", "nll_minus_entropy", "entropy", "bound_nats_per_token"))


def on_text(
    experiment: str, *, training: int, distillation: int, curriculum: int, samples: int, seeds: tuple[int, ...]
) -> Study:
    """Every method on real text: `training` steps from data, `curriculum` of them Duo's for uniform diffusion."""
    judges = ("smollm2", "run:{workdir}/autoregressive/seed0")
    alone = ONCE | {"evaluation.final_samples": samples, "evaluation.language_models": judges[:1]}
    judged = alone | {"evaluation.language_models": judges, "evaluation.steps": (1, 2, 4, 8, 64)}
    few = judged | {"evaluation.steps": (4, 8)}
    trained, students = judged | {"steps": training}, judged | {"steps": distillation}
    hot, warm, cool, cold, colder = ({"temperature": t} for t in (1.0, 0.85, 0.7, 0.5, 0.4))
    drawn = (warm, cool, cold, colder)
    # The flow's own sampler draws at temperature 0.55 from 0.8 of the noise; its hotter draws from so little of it collapse. The
    # others draw at 1. The flow map takes the likeliest tokens, from 0.4 of the noise.
    flown = ({"noise_scale": 1.0} | hot, {"noise_scale": 1.0} | cool, {"noise_scale": 0.65})
    mapped = ({"noise_scale": 0.55}, {"noise_scale": 0.7}, cold, hot)
    judge = ("autoregressive",)
    uniform = trained | {"objective.curriculum_steps": curriculum}
    runs = [
        Run("autoregressive", f"{experiment}:autoregressive", alone | {"steps": training}, None, seeds, drawn),
        Run("masked", f"{experiment}:masked", trained, None, seeds, drawn, judge),
        Run("uniform", f"{experiment}:uniform", uniform, None, seeds, drawn, judge),
        Run("flow", experiment, trained, None, seeds, flown, judge),
        Run("flow_map", f"{experiment}:flow_map", students, "flow", seeds, mapped, judge),
    ]
    more = {"last": judged, "seeds": seeds, "sweep": (*drawn, {"greedy": True}), "needs": judge}
    for student, teacher in (("sdtt", "masked"), ("dcd", "uniform")):
        runs += distilled(experiment, student, teacher, distillation, few, **more)
    matched = ("nats_per_char", "smollm2_nats_per_token", "seed0_nats_per_token", "self_bleu", "ngram_distance_2")
    shown = (*matched[:3], "entropy", "distinct_2", "self_bleu", "ngram_distance_2", "words_in_corpus")
    return Study(runs, (*shown, "bound_nats_per_token"), matched, BELOW)


def text() -> Study:
    # Without its curriculum uniform diffusion was better on the grammar.
    return on_text(SPEECHES, training=6000, distillation=3000, curriculum=0, samples=256, seeds=SEEDS)


def text_tuning() -> Study:
    """What was tried beside the runs of `text`, whose directories it shares: for the baselines, and for a map in one step."""
    rate, matched = "optimizer.learning_rate", ("nats_per_char", "smollm2_nats_per_token", "self_bleu")
    alone = ONCE | {"evaluation.final_samples": 256, "evaluation.language_models": ("smollm2",)}
    trained, students = alone | {"steps": 1500, "evaluation.steps": (8, 64)}, alone | {"evaluation.steps": (8,)}
    mapped = alone | {"steps": 1000, "evaluation.steps": (1, 2)}
    own = ("autoregressive", "masked", "uniform", "flow", "flow_map", "sdtt_32", "dcd_32")
    runs = [run for run in text().runs if run.name in own]
    student = f"{SPEECHES}:flow_map"
    for value in (1e-3, 2e-3, 4e-3):
        for name in ("masked", "uniform"):
            runs.append(Run(f"{name}_rate{value:g}", f"{SPEECHES}:{name}", trained | {rate: value}))
    for name, teacher in (("sdtt", "masked"), ("dcd", "uniform")):
        for value in (5e-4, 4e-3):
            more = {"count": 1, "suffix": f"_rate{value:g}", "seeds": (0,)}
            runs += rounds(SPEECHES, name, teacher, 600, students | {rate: value}, **more)
    less = ({"noise_scale": 0.55},)
    for name, settings in (
        ("1000", {}),
        ("average", {"objective.targets_from": "ema"}),
        ("teacher0.35", {"objective.teacher_temperature": 0.35}),
    ):
        runs.append(Run(f"flow_map_{name}", student, mapped | settings, "flow", sweep=less))
    return Study(runs, (*matched, "entropy", "bound_nats_per_token"), matched, BELOW)


def text_gpu() -> Study:
    return on_text(LM1B, training=40_000, distillation=15_000, curriculum=20_000, samples=1024, seeds=SEEDS)


def get_study(arg: str = "grammar") -> Study:
    """`arg` is `grammar`, `tuning`, `text`, `text_tuning` or `text_gpu`."""
    studies = {each.__name__: each for each in (grammar, tuning, text, text_tuning, text_gpu)}
    if arg not in studies:
        raise ValueError(f"there are the studies {', '.join(studies)}, not {arg!r}")
    return studies[arg]()
