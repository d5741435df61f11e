"""The One Billion Word benchmark for one 80 GB card: every family at 74M parameters, about half an hour each.

    flowlm train --config=experiments/lm1b_gpu.py --workdir=DIR                    also :masked, :uniform, :autoregressive
    flowlm train --config=experiments/lm1b_gpu.py:flow_map --config.teacher=DIR --workdir=DIR2      also :sdtt, :dcd
    flowlm study --study=experiments/head_to_head.py:text_gpu --workdir=DIR --results=DIR2                 all of them to one table

Needs corpus and tokenizer as lm1b.py does. Not run here, so no figures are given: docs/reference/experiments.md tells its cost.
"""

from ml_collections import ConfigDict

from flowlm import config as settings

STUDENTS = {"flow_map": "flow_map", "sdtt": "masked", "dcd": "uniform"}
BASELINES = ("autoregressive", "masked", "uniform")


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is one of STUDENTS of a run of this experiment (--config.teacher=DIR), one of BASELINES, or nothing."""
    if arg not in ("", *STUDENTS, *BASELINES):
        raise ValueError(f"lm1b_gpu knows the arguments {', '.join((*STUDENTS, *BASELINES))}, not {arg!r}")
    family = STUDENTS.get(arg, arg or "flow")
    config = settings.defaults(family)
    config.update(steps=40_000, batch_size=256, ema_decay=0.9995)
    config.data.update(name="lm1b", tokenizer="bert-base-uncased", length=128)
    config.model.update(width=512, blocks=12, heads=8, cond=128, vocab_size=30_522, dtype="bfloat16")
    config.optimizer.update(learning_rate=6e-4, warmup_steps=1000)
    config.checkpoint.update(every=2000, keep_latest=2)
    config.evaluation.update(every=20_000, held_out=2048, steps=(1, 2, 4, 8, 64), samples=256, final_samples=1024)
    if arg in STUDENTS:
        config.update(steps=15_000, teacher="")
        config.optimizer.learning_rate = 3e-4
    if arg == "flow_map":
        config.model.time_embeddings = 2
    if arg == "autoregressive":
        config.evaluation.steps = (127,)
        config.objective.start = 101  # [CLS]
    return config
