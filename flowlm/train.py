"""The training loop, from top to bottom. There is no other."""

import sys
import time
from functools import partial

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from flowlm import evaluation, run_directory, sharding, tokenizers, train_state
from flowlm.checkpoint import Checkpoints, has_params
from flowlm.curves import draw_curves
from flowlm.data import open_dataset
from flowlm.experiment import abstract_state, build, load_teacher
from flowlm.metrics import MetricWriter


def train(config: ConfigDict, workdir: str) -> None:
    """Trains the experiment to `config.steps` and evaluates it, taking up whatever `workdir` already holds.

    Raises:
      ValueError, FileNotFoundError: bad settings, missing data, another experiment's workdir; before any expensive work.
      FloatingPointError: the loss, a gradient or a parameter is not finite; nothing already saved is lost.
    """
    # ---- Everything that can be wrong is found here, before anything is prepared, written or compiled.
    data = config.data
    tokenizer = tokenizers.shipped(data.tokenizer, data.dir)
    experiment = build(config, tokenizer.vocab_size, tokenizer.start)
    mesh = sharding.make_mesh(config.mesh.data)
    sharding.check_batch(config.batch_size, config.accumulation, getattr(experiment.family, "group", 1), mesh)
    teacher = None
    if config.teacher:
        teacher = load_teacher(config, tokenizer, experiment, mesh)
    if has_params(workdir):
        raise ValueError(f"{workdir} holds parameters alone, no training state: give another --workdir")
    dataset = open_dataset(data.name, data.tokenizer, data.length, data.dir)
    run_directory.prepare(workdir, config, dataset.tokenizer)

    # ---- The state is born sharded: shapes, then places, then values.
    abstract = abstract_state(experiment, mesh)
    places = jax.tree.map(lambda a: a.sharding, abstract)
    checkpoints = Checkpoints(epath.Path(workdir) / "checkpoints", **config.checkpoint.to_dict())
    state = checkpoints.restore(abstract)
    if state is None:
        init = partial(train_state.init_state, experiment.net, experiment.family, experiment.optimizer, config.seed)
        state = jax.jit(init, out_shardings=places)(teacher)
    first = int(state.step)
    if first > config.steps:
        raise ValueError(f"{workdir} is at step {first} already: set steps to more than that, not {config.steps}")
    parameters = sum(a.size for a in jax.tree.leaves(state.params))
    print(f"{parameters:,} parameters on {mesh.size} device(s), from step {first} to {config.steps}", file=sys.stderr)

    step_fn = train_state.make_step(
        experiment.net,
        experiment.family,
        experiment.optimizer,
        seed=config.seed,
        ema_decay=config.ema_decay,
        accumulation=config.accumulation,
        dropout=config.model.dropout > 0,
    )
    step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=(places, None))
    rows = dataset.train.shuffled(config.seed)
    evaluator = evaluation.Evaluator(experiment, dataset, mesh, config.seed, config.evaluation, data.dir)
    writer = MetricWriter(workdir, start=first, tensorboard=config.tensorboard)
    progress = tqdm(total=config.steps, initial=first, unit="step", smoothing=0.05, dynamic_ncols=True)

    # ---- save, take batch, step, log the previous step's metrics, evaluate.
    metrics, logged, clock = None, first, time.perf_counter()
    try:
        for step in range(first, config.steps):
            if step > first and checkpoints.should_save(step):
                _check_finite(metrics, step, checkpoints)
                checkpoints.save(step, state)

            batch = sharding.global_rows(rows, step * config.batch_size, config.batch_size, data.length, mesh)
            previous = metrics
            state, metrics = step_fn(state, batch, teacher)
            progress.update()

            # Reading the previous step's numbers leaves the device busy with this one.
            if step > first and step % config.log_every == 0:
                values = _check_finite(previous, step, checkpoints)
                values["learning_rate"] = float(experiment.schedule(step - 1))
                if step > logged:  # not right after an evaluation
                    now = time.perf_counter()
                    values["tokens_per_second"] = (step - logged) * config.batch_size * data.length / (now - clock)
                    logged, clock = step, now
                writer.write(step, values)
                progress.set_postfix(
                    loss=f"{values['loss']:.3f}", tokens_per_s=f"{values.get('tokens_per_second', 0):.0f}"
                )

            done = step + 1
            if done < config.steps and done % config.evaluation.every == 0:
                _check_finite(metrics, done, checkpoints)
                writer.write(done, evaluator(state.ema, done, config.evaluation.samples).metrics)
                logged, clock = done, time.perf_counter()

        # ---- The end: the last state is saved before it is judged. A run that was finished already is only judged again.
        if metrics is not None:
            values = _check_finite(metrics, config.steps, checkpoints)
            checkpoints.save(config.steps, state)
        progress.close()
        result = evaluator(state.ema, config.steps, config.evaluation.final_samples)
        if metrics is not None:
            writer.write(config.steps, values | result.metrics)
        result.save(workdir)
        draw_curves(workdir)
        result.show()
    finally:
        progress.close()
        writer.close()
        checkpoints.close()


def _check_finite(metrics, step: int, checkpoints: Checkpoints) -> dict[str, float]:
    """The numbers of one step on the host; stops the run if its loss, gradient or parameters are not finite."""
    values = {name: float(np.asarray(value)) for name, value in metrics.items()}
    if not all(np.isfinite(values[name]) for name in ("loss", "grad_norm", "param_norm")):
        saved = checkpoints.steps
        good = f"the last good checkpoint is step {saved[-1]}" if saved else "no checkpoint was saved before it"
        raise FloatingPointError(
            f"loss {values['loss']}, gradient norm {values['grad_norm']} and parameter norm {values['param_norm']} at step "
            f"{step}: {good}; lower optimizer.learning_rate or optimizer.clip_norm and run again with a new workdir"
        )
    return values
