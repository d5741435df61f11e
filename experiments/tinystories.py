"""TinyStories (2305.07759), simple English for small networks: 4,096 ids made of its own text, 256 at a time, 35M parameters.

    flowlm prepare --source=hf:roneneldan/TinyStories --tokenizer=bpe:4096 --length=256 --out=DATA
    flowlm train --config=experiments/tinystories.py:DATA --workdir=DIR
    flowlm train --config=experiments/tinystories.py:DATA:flow_map --config.teacher=DIR --workdir=DIR2

Meant for one accelerator. Not run here, so no figures are given.
"""

from ml_collections import ConfigDict

from flowlm import config as settings
from flowlm.data import own_text


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is the folder that `flowlm prepare` made, behind it `:flow_map` for a student; without one nothing can be trained."""
    folder, family = own_text.argument(arg)
    config = settings.defaults(family or "flow")
    config.update(steps=50_000, batch_size=256, ema_decay=0.9995)
    made = dict(name="own_text", tokenizer="DATA/tokenizer.json", length=256)
    config.data.update(own_text.settings(folder) if folder else made)
    config.model.update(width=512, blocks=8, heads=8, cond=128, vocab_size=4096, dtype="bfloat16")
    config.optimizer.update(learning_rate=6e-4, warmup_steps=1000)
    config.checkpoint.update(every=2000, keep_latest=2)
    config.evaluation.update(every=10_000, held_out=2048, steps=(1, 2, 4, 8, 64), samples=256, final_samples=1024)
    if family:
        config.update(steps=15_000, teacher="")
        config.optimizer.learning_rate = 3e-4
        config.model.time_embeddings = 2
    return config
