"""OpenWebText with the paper's settings (2602.16813): GPT-2 tokens, 1,024 at a time.

    flowlm prepare data --config=experiments/openwebtext.py
    flowlm train --config=experiments/openwebtext.py --workdir=DIR
    flowlm train --config=experiments/openwebtext.py:flow_map --config.teacher=DIR --workdir=DIR2

Corpus and tokenizer are not shipped: docs/reference/experiments.md says which files to put where, before the first line. The
paper trains 170M parameters for 1M steps at a global batch of 512. Not run here; docs/results/plan.md has what it needs of TPUs.
"""

from ml_collections import ConfigDict

from flowlm import config as settings


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is `flow_map`, for the student of a run of this experiment (--config.teacher=DIR), or nothing."""
    if arg not in ("", "flow_map"):
        raise ValueError(f"openwebtext knows the argument flow_map, not {arg!r}")
    config = settings.defaults(arg or "flow")
    config.update(steps=1_000_000, batch_size=512, ema_decay=0.9999)
    config.data.update(name="openwebtext", tokenizer="gpt2", length=1024)
    config.model.update(
        settings.model("small").to_dict() | dict(vocab_size=50_257, dropout=0.1, dtype="bfloat16", remat="full")
    )
    config.model.attention = "splash"  # on a GPU: xla
    config.optimizer.update(learning_rate=3e-4, schedule="constant", warmup_steps=2500)
    config.checkpoint.update(every=5000, keep_latest=2, keep_every=100_000)
    # So the last evaluation takes the time of about 420 training steps, by the plan; `flowlm evaluate --num` draws more.
    config.evaluation.update(every=50_000, held_out=1024, steps=(1, 8, 64, 1024), final_samples=512)
    if arg == "flow_map":
        config.update(steps=100_000, teacher="")
        config.model.update(time_embeddings=2, dropout=0.0)
        config.evaluation.steps = (1, 2, 4, 8)
    return config
