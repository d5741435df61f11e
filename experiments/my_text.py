"""Text of your own, with the network and budget of speeches.py: about 10 minutes on 2 CPU cores.

    flowlm prepare --source=textfiles --path=TEXTS --tokenizer=bpe:512 --length=32 --out=DATA
    flowlm train --config=experiments/my_text.py:DATA --workdir=DIR
    flowlm train --config=experiments/my_text.py:DATA:flow_map --config.teacher=DIR --workdir=DIR2

The settings are those that were right for a million characters: give more `steps` and a larger `model` to more text. What to expect
depends on the text; every table has held-out rows and tokens without a model beside it. docs/guides/own_text.md has the rest.
"""

from ml_collections import ConfigDict

from flowlm import config as settings
from flowlm.data import own_text
from flowlm.data.tokenizers import Tokenizer


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is a folder that `flowlm prepare` made, or its copy in a bucket; with `:flow_map` behind it, to distil a run on it."""
    folder, family = own_text.argument(arg)
    if not folder:
        raise ValueError(
            f"my_text takes DATA or DATA:flow_map, DATA being a folder that `flowlm prepare` made, not {arg!r}"
        )
    config = settings.defaults(family or "flow")
    config.update(steps=2000, batch_size=64)
    config.optimizer.update(learning_rate=2e-3, b2=0.99)
    config.data.update(own_text.settings(folder))
    config.model.update(
        vocab_size=Tokenizer.load(config.data.tokenizer).vocab_size,
        time_scale=1000.0,
        gate_init=1.0,
        learned_positions=True,
        input="white",
        output="early_skip",
    )
    config.evaluation.update(every=2000, steps=(1, 2, 4, 8, 32, 64), samples=128, final_samples=512)
    if family == "flow_map":
        config.update(steps=600, teacher="")
        config.model.update(preview=True, time_embeddings=2)
        config.objective.update(noise_scale=0.5)
        config.evaluation.steps = (1, 2, 4, 8, 32)
    return config
