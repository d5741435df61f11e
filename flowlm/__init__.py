"""Flow-map language models in JAX: few-step text generation by interpolants, flow maps and diffusion.

    import flowlm

    model = flowlm.load("checkpoints/grammar_fmlm")  # a run directory, or what was exported of one
    print(*model.sample(num=8, steps=1), sep="\\n")  # eight texts, each in one network call
    model.log_prob_bound(["the old king feeds the bird ."])  # nats

    config = flowlm.experiment("experiments/grammar.py", **{"optimizer.learning_rate": 1e-3})
    flowlm.train(config, "runs/grammar")
    flowlm.push("runs/grammar", "NAME/MODEL")  # to the Hugging Face Hub, from where load("hub:NAME/MODEL") reads it

`flowlm --help` lists the same and more as commands. Each function imports what it needs, so that importing flowlm takes no time.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from flowlm.runs.model import Model

__all__ = ["__version__", "experiment", "load", "push", "train"]
__version__ = "0.1.0"


def load(directory: str | os.PathLike, **objective: Any) -> "Model":
    """Loads a trained model: its averaged parameters, on all devices of this process. Nothing on disk is touched.

    Args:
      directory: of a run, whose newest checkpoint is taken, what `flowlm export` (but for --format=jax) or `flowlm import` made, or
        a model on the Hugging Face Hub, hub:NAME/MODEL[@REVISION].
      objective: settings of the run's `objective` section to replace, such as temperature=0.8 or noise_scale=0.5.

    Returns:
      a flowlm.runs.model.Model, with `sample`, `sample_ids`, `log_prob_bound`, `samplers`, `tokenizer` and `config`.

    Raises:
      FileNotFoundError: it is no such directory, or nothing was saved in it yet.
      ValueError: the run's objective has no such setting, or it cannot be so; or a file is damaged.
      ImportError, OSError: a model on the Hub cannot be fetched.
    """
    from flowlm.runs import model

    return model.load_model(directory, **objective)


def experiment(path: str, **changes: Any) -> "ConfigDict":
    """The settings of an experiment, checked as those of `flowlm train --config=PATH --config.KEY=VALUE` are.

    Args:
      path: `experiments/NAME.py`, with an argument of its own behind a colon, such as `experiments/grammar.py:flow_map`.
      changes: settings to replace, by their paths: teacher="runs/flow", or **{"optimizer.learning_rate": 1e-3}.

    Returns:
      every setting of a run, locked: a key that it does not have is an error.

    Raises:
      ValueError: there is no such experiment, it has no such setting (the nearest is named), or a value is out of its range.
    """
    from flowlm.cli.command import configured
    from flowlm.config import check_settings

    config = configured(path, changes)
    check_settings(config)
    return config


def train(config: "ConfigDict", workdir: str | os.PathLike) -> None:
    """Trains an experiment to `config.steps` and evaluates it, taking up whatever `workdir` already holds.

    Args:
      config: of `experiment`.
      workdir: a new directory, or that of a run of the same experiment; `load` reads it.

    Raises:
      ValueError, FileNotFoundError: bad settings, missing data, or the workdir of another experiment; before any expensive work.
      FloatingPointError: the loss, a gradient or a parameter is not finite; nothing already saved is lost.
    """
    from flowlm import training

    training.train(config, os.fspath(workdir))


def push(directory: str | os.PathLike, repo: str, private: bool = False) -> str:
    """Sends a trained model to the Hugging Face Hub: safetensors, settings, tokenizer, and a card that says how it was made.

    Args:
      directory: as `load` takes it.
      repo: NAME/MODEL, which is made if it is not there.
      private: only who is allowed to can read it.

    Returns:
      hub:NAME/MODEL@COMMIT, which `load` takes.

    Raises:
      ImportError: the extra hub is not installed.
      OSError: there is no login (`hf auth login`), it may not write there, or the Hub cannot be reached.
      ValueError, FileNotFoundError: as `load`; or `private` was asked for, and the repository is public already.
    """
    from flowlm.engine.sharding import Layout, make_mesh
    from flowlm.exchange import push as exchange

    return exchange.push(directory, repo, Layout(make_mesh(), fsdp=True), private).place
