"""quickstart (being measured)"""

from ml_collections import ConfigDict

from flowlm import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    del arg
    config = settings.defaults()
    config.update(steps=2000, batch_size=64)
    config.optimizer.update(learning_rate=2e-3, b2=0.99)
    config.data.update(name="sotu", tokenizer="sotu_bpe_512", length=32)
    config.model.update(vocab_size=512, input="both", time_scale=1000.0, gate_init=1.0, learned_positions=True)
    config.evaluation.update(every=1000, steps=(1, 2, 8, 64), samples=128, final_samples=512)
    return config
