"""grammar98, synthetic English whose exact law judges every sample: the ruler of this project at CPU size.

    flowlm train --config=experiments/grammar.py --workdir=DIR

RESULTS
"""

from ml_collections import ConfigDict

from flowlm import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is the network's input: raw, scaled, posterior or both (the default)."""
    config = settings.defaults()
    config.update(steps=3600, batch_size=128)
    config.data.update(name="grammar98", tokenizer="grammar98", length=19)
    config.model.update(vocab_size=99, input=arg or "both", time_scale=1000.0, gate_init=1.0, learned_positions=True)
    # The raw part of the input overfits the noise: decaying its matrix costs a little cross-entropy and mends samples.
    config.optimizer.update(learning_rate=2e-3, b2=0.99, weight_decay=0.4, decay_pattern="mix_raw")
    config.evaluation.update(every=1800, steps=(1, 2, 8, 64), samples=256, final_samples=2048)
    return config
