"""The quickstart: a small flow language model on the State of the Union speeches, and its flow map, from nothing to scored text.

    flowlm train --config=experiments/quickstart.py --workdir=DIR        (bash launch/quickstart.sh does both from a fresh machine)
    flowlm train --config=experiments/quickstart.py:flow_map --config.teacher=DIR --workdir=DIR2

512 byte-level BPE tokens, rows of 32, 1.2M parameters, 2,000 steps of 64 rows, about one pass over the corpus; then 600 of
distillation. Expected on 2 CPU cores: 7 minutes of training, 3 of distillation, 3 of sampling and scoring. Expected numbers
are in README.md and results/quickstart*.json. Tried at the same budget, seed 0, 512 samples at 64 ancestral steps:

    input, vocabulary, warp     cross-entropy mean (context-free)   at tau .05    nats per character   distinct-2 (held out)
    with the posterior mean in place of draws
    both, 512, ambient          2.26 (2.50)                         .08 above     2.86                 .50 (.38)
    both, 512, embedded         0.72 (0.99)                         above         2.94                 .48 (.38)
    both, 112 letters, ambient  1.73 (1.87)                         .01 above     3.49                 .34 (.20)
    with draws at temperature 0.7 (0.6 in the last two lines)
    both, 512, ambient          2.26 (2.50)                         .08 above     2.80                 .40 (.38)
    the same, learnt prior      2.24 (2.52)                         .04 above     2.83                 .42 (.38)
    white without the prior     2.39 (2.65)                         .01 below     2.97                 .43 (.38)
    the same at 0.6             2.35 (2.61)                         .01 above     2.87                 .39 (.38)
    white with it (shipped)     2.35 (2.63)                         .001 below    2.88                 .39 (.38)

`white` without the prior at 0.7 and at 0.6 were trained alike, but rounding differed in the scale of the input: a run's luck is
worth .02 at tau .05.
Where V > D the network makes the embeddings of frequent tokens long, so they can be read early: in embedded time most of it is over
by tau .05, and few-step samples fall for rare bytes.
"""

from ml_collections import ConfigDict

from flowlm import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is `flow_map` for the student of a run of this experiment (--config.teacher=DIR), or nothing."""
    if arg not in ("", "flow_map"):
        raise ValueError(f"quickstart knows the argument flow_map, not {arg!r}")
    config = settings.defaults(arg or "flow")
    config.update(steps=2000, batch_size=64)
    config.optimizer.update(learning_rate=2e-3, b2=0.99)
    config.data.update(name="sotu", tokenizer="sotu_bpe_512", length=32)
    config.model.update(
        vocab_size=512, input="white", output="early_skip", time_scale=1000.0, gate_init=1.0, learned_positions=True
    )
    config.evaluation.update(every=2000, steps=(1, 2, 4, 8, 32, 64), samples=128, final_samples=512)
    if arg == "flow_map":
        config.steps = 600
        # The flow of sharpened predictions: one jump cannot draw at a temperature.
        config.objective.update(teacher_temperature=0.5, noise_scale=0.5)
        config.model.update(preview=True, time_embeddings=2)
        config.evaluation.steps = (1, 2, 4, 8, 32)
    else:
        # Draws sharpened and noise shrunk until the samples' diversity is that of held-out text.
        config.objective.update(temperature=0.55, noise_scale=0.8)
    return config
