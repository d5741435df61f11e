"""grammar1k, synthetic English of 1,375 words in rows of 48: agreement and reference over three sentences, judged exactly.

    flowlm train --config=experiments/grammar1k.py --workdir=DIR
    flowlm train --config=experiments/grammar1k.py:flow_map --config.teacher=DIR --workdir=DIR2

An estimated 30 minutes on 2 idle CPU cores and 45 for the flow map, by the quickstart's tokens a second; not run to its end. The
hero of a story keeps gender, number and name through three sentences, and what is got in the first is named again in the second: a
trigram chain writes no grammatical row.
"""

from ml_collections import ConfigDict

from flowlm import config as settings

STUDENTS = {"flow_map": "flow_map", "residual": "residual", "sdtt": "masked", "dcd": "uniform"}
BASELINES = ("autoregressive", "masked", "uniform")


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is one of STUDENTS of a run of this experiment (--config.teacher=DIR), one of BASELINES, or nothing."""
    if arg not in ("", *STUDENTS, *BASELINES):
        raise ValueError(f"grammar1k knows the arguments {', '.join((*STUDENTS, *BASELINES))}, not {arg!r}")
    family = STUDENTS.get(arg, arg or "flow")
    config = settings.defaults(family)
    config.update(steps=3600, batch_size=64)
    config.data.update(name="grammar1k", tokenizer="grammar1k", length=49)
    config.model.update(vocab_size=1377, time_scale=1000.0, gate_init=1.0, learned_positions=True)
    config.optimizer.update(learning_rate=2e-3, b2=0.99)
    config.evaluation.update(every=1800, steps=(1, 2, 8, 64), samples=256, final_samples=1024)
    if family in ("flow", "flow_map", "residual"):
        config.model.update(input="white", output="early_skip")
    if family == "autoregressive":
        config.objective.start = 1376
        config.evaluation.steps = (48,)
    if arg in STUDENTS:
        config.update(steps=4500, teacher="")
        config.optimizer.learning_rate = 1e-3
        config.evaluation.update(every=2000, steps=(1, 2, 4, 8))
    if arg in ("flow_map", "residual"):
        config.model.update(preview=True, time_embeddings=2)
    if arg == "flow_map":
        config.objective.update(target="csd", noise_scale=0.5)
    return config
