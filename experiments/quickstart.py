"""The quickstart."""

from ml_collections import ConfigDict

from flowlm import config as settings

STUDENTS = {"flow_map": "flow_map", "sdtt": "masked", "dcd": "uniform"}
BASELINES = ("autoregressive", "masked", "uniform")


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is one of STUDENTS of a run of this experiment (--config.teacher=DIR), one of BASELINES, or nothing."""
    if arg not in ("", *STUDENTS, *BASELINES):
        raise ValueError(f"quickstart knows the arguments {', '.join((*STUDENTS, *BASELINES))}, not {arg!r}")
    family = STUDENTS.get(arg, arg or "flow")
    config = settings.defaults(family)
    config.update(steps=2000, batch_size=128)
    config.optimizer.update(learning_rate=2e-3, b2=0.99)
    config.data.update(name="everyday", tokenizer="everyday_1000", length=10)
    config.model.update(vocab_size=1009, time_scale=1000.0, gate_init=1.0, learned_positions=True)
    config.evaluation.update(every=100000, steps=(1, 8), samples=128, final_samples=4096)
    if family in ("flow", "flow_map"):
        config.model.update(input="white", output="early_skip")
    if arg in STUDENTS:
        config.update(steps=600, teacher="")
    if arg == "flow_map":
        config.model.update(preview=True, time_embeddings=2)
        config.objective.update(teacher_temperature=0.45, noise_scale=0.4)
        config.optimizer.learning_rate = 4e-3
    if arg == "autoregressive":
        config.evaluation.steps = (9,)
    return config
