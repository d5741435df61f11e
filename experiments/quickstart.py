"""The quickstart: a small flow language model of short everyday English sentences, and its flow map, from nothing to scored text.

    flowlm train --config=experiments/quickstart.py --workdir=DIR        (bash launch/quickstart.sh does both from a fresh machine)
    flowlm train --config=experiments/quickstart.py:flow_map --config.teacher=DIR --workdir=DIR2

Under ten minutes on 2 idle CPU cores; :masked, :uniform, :autoregressive and the students :sdtt, :dcd are the baselines.
One step of the map has 1.62 nats per character, real sentences 1.41: docs/results/everyday.md, with what was tried.
"""

from ml_collections import ConfigDict

from flowlm import config as settings

STUDENTS = {"flow_map": "flow_map", "matched": "matched", "sdtt": "masked", "dcd": "uniform"}
BASELINES = ("autoregressive", "masked", "uniform")


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is one of STUDENTS of a run of this experiment (--config.teacher=DIR), one of BASELINES, or nothing."""
    if arg not in ("", *STUDENTS, *BASELINES):
        raise ValueError(f"quickstart knows the arguments {', '.join((*STUDENTS, *BASELINES))}, not {arg!r}")
    family = STUDENTS.get(arg, arg or "flow")
    config = settings.defaults(family)
    config.update(steps=2000, batch_size=128)
    config.optimizer.update(learning_rate=2e-3, b2=0.99)
    config.data.update(name="everyday", tokenizer="everyday_1000", length=9)
    config.model.update(vocab_size=1009, time_scale=1000.0, gate_init=1.0, learned_positions=True)
    config.evaluation.update(every=0, steps=(1, 8), samples=256, final_samples=4096)
    if family in ("flow", "flow_map", "matched"):
        config.model.update(input="white", output="early_skip")
    if arg == "":
        # Draws sharpened and noise shrunk: a sentence of eight good words in place of eight likely ones.
        config.objective.update(temperature=0.55, noise_scale=0.8)
        config.evaluation.steps = (8,)
    if arg in STUDENTS:
        config.update(steps=650, teacher="")
    if arg in ("flow_map", "matched"):
        config.model.update(preview=True, time_embeddings=2)
    if arg == "flow_map":
        # The flow of sharpened predictions: one jump cannot draw at a temperature.
        config.objective.update(teacher_temperature=0.7, targets_from="ema", boundary=0.25, noise_scale=0.5)
        config.optimizer.learning_rate = 3e-3
    if arg == "matched":
        config.update(steps=1500, ema_decay=0.99)
        config.objective.update(teacher_temperature=0.7, noise_scale=0.5)
        config.optimizer.update(learning_rate=5e-4, b1=0.0)
    if arg == "autoregressive":
        config.evaluation.steps = (8,)
    return config
