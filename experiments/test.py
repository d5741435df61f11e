"""The smallest experiment: a few steps on the grammar, to see that everything turns.

    flowlm train --config=experiments/test.py --workdir=/tmp/flowlm-test

Expected: under a minute on 2 cores; the samples are not yet sentences.
"""

from ml_collections import ConfigDict

from flowlm import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    del arg
    config = settings.defaults()
    config.steps = 40
    config.batch_size = 32
    config.data.update(name="grammar98", tokenizer="grammar98", length=19)
    config.model.update(settings.model("test").to_dict() | dict(vocab_size=99, input="both", gate_init=1.0))
    config.optimizer.warmup_steps = 10
    config.checkpoint.every = 20
    config.evaluation.update(every=20, held_out=64, taus=(0.2, 0.5, 0.8), steps=(1, 8), samples=32, final_samples=64)
    config.log_every = 10
    return config
