"""A small flow language model on the State of the Union speeches, and its flow map: 512 byte-level BPE tokens, rows of 32.

    flowlm train --config=experiments/speeches.py --workdir=DIR          also :masked, :uniform, :autoregressive
    flowlm train --config=experiments/speeches.py:flow_map --config.teacher=DIR --workdir=DIR2      also :sdtt, :dcd

13 minutes on 2 CPU cores with sampling and scoring, one pass over the corpus. One step of the map has 3.05 nats per character, four
Euler steps of the flow 3.27: docs/results/speeches.md, with what was tried; results/study/text compares the baselines.
"""

from ml_collections import ConfigDict

from flowlm import config as settings

STUDENTS = {"flow_map": "flow_map", "sdtt": "masked", "dcd": "uniform"}
BASELINES = ("autoregressive", "masked", "uniform")


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is one of STUDENTS of a run of this experiment (--config.teacher=DIR), one of BASELINES, or nothing."""
    if arg not in ("", *STUDENTS, *BASELINES):
        raise ValueError(f"speeches knows the arguments {', '.join((*STUDENTS, *BASELINES))}, not {arg!r}")
    family = STUDENTS.get(arg, arg or "flow")
    config = settings.defaults(family)
    config.update(steps=2000, batch_size=64)
    config.optimizer.update(learning_rate=2e-3, b2=0.99)
    config.data.update(name="sotu", tokenizer="sotu_bpe_512", length=32)
    config.model.update(vocab_size=512, time_scale=1000.0, gate_init=1.0, learned_positions=True)
    config.evaluation.update(every=2000, steps=(1, 2, 4, 8, 32, 64), samples=128, final_samples=512)
    if family in ("flow", "flow_map"):
        config.model.update(input="white", output="early_skip")
    if arg in STUDENTS:
        config.update(steps=600, teacher="")
        config.evaluation.steps = (1, 2, 4, 8, 32)
    if arg == "":
        # Draws sharpened and noise shrunk until the samples' diversity is that of held-out text.
        config.objective.update(temperature=0.55, noise_scale=0.8)
    if arg == "flow_map":
        config.model.update(preview=True, time_embeddings=2)
        # The flow of sharpened predictions: one jump cannot draw at a temperature.
        config.objective.update(teacher_temperature=0.45, noise_scale=0.4)
        config.optimizer.learning_rate = 4e-3
    if arg == "autoregressive":
        config.evaluation.steps = (31,)
    return config
