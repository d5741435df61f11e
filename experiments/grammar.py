"""grammar98, synthetic English whose exact law judges every sample: the ruler of this project at CPU size.

    flowlm train --config=experiments/grammar.py --workdir=DIR
    flowlm train --config=experiments/grammar.py:flow_map --config.teacher=DIR --workdir=DIR2
    flowlm train --config=experiments/grammar.py:matched --config.teacher=DIR2 --workdir=DIR3

14 minutes on 2 CPU cores, and 23 for the flow map. 64 ancestral steps of the flow write .765 grammatical rows, half of the noise in
one step of the map .21: docs/results/grammar.md, with the other inputs; docs/guides/distil.md has the baselines and their students.
"""

from ml_collections import ConfigDict

from flowlm import config as settings

STUDENTS = {"flow_map": "flow_map", "gumbel": "gumbel", "residual": "residual", "sdtt": "masked", "dcd": "uniform"}
MATCHED = ("matched", "matched_masked", "matched_uniform")  # the last two begin at a run of :masked, of :uniform
STUDENTS |= dict(zip(MATCHED, MATCHED))
BASELINES = ("autoregressive", "masked", "uniform")


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is a flow's input (raw, scaled, posterior, white or both, the default), one of BASELINES or one of STUDENTS."""
    family = STUDENTS.get(arg, arg if arg in BASELINES else "flow")
    config = settings.defaults(family)
    config.update(steps=3600, batch_size=128)
    config.data.update(name="grammar98", tokenizer="grammar98", length=19)
    config.model.update(vocab_size=99, time_scale=1000.0, gate_init=1.0, learned_positions=True)
    # Only the matrix of the input's raw part decays: it overfits the noise (see above).
    config.optimizer.update(learning_rate=2e-3, b2=0.99, weight_decay=0.4, decay_pattern="mix_raw")
    config.evaluation.update(every=1800, steps=(1, 2, 8, 64), samples=256, final_samples=2048)
    if family in ("flow", "flow_map", "matched", "gumbel", "residual"):
        config.model.input = "both" if arg in STUDENTS else arg or "both"
    if family == "autoregressive":
        config.objective.start = 98
        config.evaluation.steps = (18,)
    if arg in STUDENTS:
        config.update(steps=4500, teacher="")
        config.optimizer.update(learning_rate=1e-3, weight_decay=0.0)
        config.evaluation.update(every=2000, steps=(1, 2, 4, 8))
    if arg in ("flow_map", "matched", "gumbel", "residual"):
        config.model.update(preview=True, time_embeddings=2)
    if arg == "flow_map":
        config.objective.update(target="csd", noise_scale=0.5)
    if arg == "gumbel":
        config.evaluation.steps = (1,)
    if arg in MATCHED:
        config.update(steps=2400, ema_decay=0.99)
        config.optimizer.update(learning_rate=1e-3, b1=0.0)
        config.evaluation.update(every=600)
    if arg == "matched":
        # Coherent text of one call needs positions that agree: on noise that reads as one token each, and that they mostly share.
        # What is written from such noise is less likely than the flow's rows, so the flow that is followed is somewhat sharper.
        config.steps = 3000
        config.model.preview_time = 0.8
        config.objective.update(shared_noise=0.9, teacher_temperature=0.7, auxiliary_updates=1)
    return config
