"""text8 at the reference's size: characters (27 and a start token), 256 at a time.

    flowlm prepare data --config=experiments/text8.py
    flowlm train --config=experiments/text8.py --workdir=DIR

Needs text8 itself, which is not shipped: put the file `text8` (100,000,000 characters, http://mattmahoney.net/dc/text8.zip,
unzipped or not) into <data.dir>/sources/. Meant for one accelerator or more; not run here, so no figures are given.
"""

from ml_collections import ConfigDict

from flowlm import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is unused."""
    del arg
    config = settings.defaults()
    config.update(steps=500_000, batch_size=512, ema_decay=0.9999)
    config.data.update(name="text8", tokenizer="chars", length=256)
    config.model.update(settings.model("small").to_dict() | dict(vocab_size=28, dropout=0.1, dtype="bfloat16"))
    config.optimizer.update(learning_rate=3e-4, schedule="constant", warmup_steps=2500)
    config.checkpoint.update(every=5000, keep_latest=2, keep_every=100_000)
    config.evaluation.update(every=25_000, held_out=2048, steps=(1, 8, 64, 256))
    return config
