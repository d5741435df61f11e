"""FineWeb-Edu, its sample of 10 billion tokens, as the paper (2602.16813) trains on OpenWebText: GPT-2 tokens, 1,024 at a time.

    flowlm prepare --source=hf:HuggingFaceFW/fineweb-edu,sample-10BT --tokenizer=gpt2 --length=1024 --out=DATA
    flowlm train --config=experiments/fineweb_edu.py:DATA --workdir=DIR
    flowlm train --config=experiments/fineweb_edu.py:DATA:flow_map --config.teacher=DIR --workdir=DIR2

Files that are here already are read by --source=parquet --path=FOLDER in its place. Not run here, so no figures are given.
"""

from ml_collections import ConfigDict

from flowlm import config as settings
from flowlm.data import own_text


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is the folder that `flowlm prepare` made, behind it `:flow_map` for a student; without one nothing can be trained."""
    folder, family = own_text.argument(arg)
    config = settings.defaults(family or "flow")
    config.update(steps=1_000_000, batch_size=512, ema_decay=0.9999)
    config.data.update(own_text.settings(folder) if folder else dict(name="own_text", tokenizer="gpt2", length=1024))
    config.model.update(
        settings.model("small").to_dict() | dict(vocab_size=50_257, dropout=0.1, dtype="bfloat16", remat="full")
    )
    config.model.attention = "splash"  # on a GPU: xla
    config.optimizer.update(learning_rate=3e-4, schedule="constant", warmup_steps=2500)
    config.checkpoint.update(every=5000, keep_latest=2, keep_every=100_000)
    config.evaluation.update(every=50_000, held_out=1024, steps=(1, 8, 64, 1024))
    if family:
        config.update(steps=100_000, teacher="")
        config.model.update(time_embeddings=2, dropout=0.0)
        config.evaluation.steps = (1, 2, 4, 8)
    return config
