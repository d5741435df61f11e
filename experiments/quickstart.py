"""The quickstart: a small flow language model of short everyday English sentences, and its flow map, from nothing to scored text.

    flowlm train --config=experiments/quickstart.py --workdir=DIR        (bash launch/quickstart.sh does both from a fresh machine)
    flowlm train --config=experiments/quickstart.py:flow_map --config.teacher=DIR --workdir=DIR2

    flowlm train --config=experiments/quickstart.py:masked --workdir=DIR      the baselines: also :uniform, :autoregressive and the
                                                                              students :sdtt, :dcd

Sentences of 3 to 8 tokens, the 1,000 most common words and punctuation; 1.3M parameters, 2,000 steps of 128 rows, which is seven
passes over the corpus, then 900 of distillation. Expected on 2 idle CPU cores: 4 minutes of training, 3 of distillation, 1 of
sampling and scoring. Expected numbers are in README.md and results/everyday*.json. The next size, sentences of up to 13 tokens:
--config.data.tokenizer=everyday_2000 --config.data.length=14 --config.model.vocab_size=2009.

What was tried for the flow at about this budget, seed 0, 512 samples at 8 ancestral steps, none sharpened (real sentences have 1.38
nats per character; rows of 10 in the first three lines, of 9 below):

    input, output          time warp    steps x rows    nats per character    bound, nats per token
    white, early_skip      ambient      2,400 x 128     1.50                  8.2
    both, plain            ambient      2,400 x 128     1.60                  11.2
    white, early_skip      embedded     1,800 x 128     1.74                  3.4
    white, early_skip      between      1,500 x 128     1.58                  4.5
    the same at a rate of .005                          1.59                  4.9
    white, early_skip      ambient      2,800 x 64      1.57                  12.2

In ambient time much of a sentence is open to its end (there the network is .1 nats below the context-free line), and yet warps that
leave time for it write worse in 8 steps, as rare words come too often.

What was tried for the map in one step from half of the noise, 900 steps, seeds 0 and 1 (also of the flow; 4,096 samples):

    teacher temperature, targets, boundary    rate    nats per character    distinct rows    entropy of all words
    .7, average, 1/4 (shipped)                .003    1.62, 1.76            .968, 1.000      4.13, 4.29
    .5, student, 1/32                         .004    1.72, 1.92            .864, .987       3.56, 3.87

A seed is worth more than either. All of the noise is no better in one step (1.73, 1.75) and more diverse in eight.
"""

from ml_collections import ConfigDict

from flowlm import config as settings

STUDENTS = {"flow_map": "flow_map", "sdtt": "masked", "dcd": "uniform"}
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
    config.evaluation.update(every=2000, steps=(1, 8), samples=256, final_samples=4096)
    if family in ("flow", "flow_map"):
        config.model.update(input="white", output="early_skip")
    if arg == "":
        # Draws sharpened and noise shrunk: a sentence of eight good words in place of eight likely ones.
        config.objective.update(temperature=0.55, noise_scale=0.8)
        config.evaluation.steps = (8,)
    if arg in STUDENTS:
        config.update(steps=900, teacher="")
    if arg == "flow_map":
        config.model.update(preview=True, time_embeddings=2)
        # The flow of sharpened predictions: one jump cannot draw at a temperature.
        config.objective.update(teacher_temperature=0.7, targets_from="ema", boundary=0.25, noise_scale=0.5)
        config.optimizer.learning_rate = 3e-3
    if arg == "autoregressive":
        config.evaluation.steps = (8,)
    return config
