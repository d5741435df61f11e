"""Molecules of QM9 as SMILES strings, a character a token, one a row of 24: RDKit says which samples are molecules.

    flowlm prepare qm9                  fetches them from PyPI, 104 MB;        pip install -e .[molecules] the judge
    flowlm train --config=experiments/molecules.py --workdir=DIR
    flowlm train --config=experiments/molecules.py:flow_map --config.teacher=DIR --workdir=DIR2

An estimated 18 minutes on 2 idle CPU cores and 29 for the flow map, by the tokens a second of grammar.py; not run to its end.
A chain that keeps seven characters in mind writes .51 molecules. Without the judge: "--config.evaluation.language_models=()"
"""

from ml_collections import ConfigDict

from flowlm import config as settings

STUDENTS = {"flow_map": "flow_map", "residual": "residual", "sdtt": "masked", "dcd": "uniform"}
BASELINES = ("autoregressive", "masked", "uniform")


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is one of STUDENTS of a run of this experiment (--config.teacher=DIR), one of BASELINES, or nothing."""
    if arg not in ("", *STUDENTS, *BASELINES):
        raise ValueError(f"molecules knows the arguments {', '.join((*STUDENTS, *BASELINES))}, not {arg!r}")
    family = STUDENTS.get(arg, arg or "flow")
    config = settings.defaults(family)
    config.update(steps=3600, batch_size=128)
    config.data.update(name="qm9", tokenizer="qm9", length=24)
    config.model.update(vocab_size=20, time_scale=1000.0, gate_init=1.0, learned_positions=True)
    config.optimizer.update(learning_rate=2e-3, b2=0.99)
    config.evaluation.update(
        every=1800, steps=(1, 2, 8, 64), samples=256, final_samples=2048, language_models=("rdkit",)
    )
    if family in ("flow", "flow_map", "residual"):
        config.model.input = "both"
    if family == "autoregressive":
        config.objective.start = 18
        config.evaluation.steps = (23,)
    if arg in STUDENTS:
        config.update(steps=4500, teacher="")
        config.optimizer.learning_rate = 1e-3
        config.evaluation.update(every=2000, steps=(1, 2, 4, 8))
    if arg in ("flow_map", "residual"):
        config.model.update(preview=True, time_embeddings=2)
    if arg == "flow_map":
        config.objective.update(target="csd", noise_scale=0.5)
    return config
