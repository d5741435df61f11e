"""The training loop, from top to bottom. There is no other."""

import contextlib
import sys
import time
from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from flowlm.data import open_dataset, tokenizers
from flowlm.engine import sharding
from flowlm.engine import state as train_state
from flowlm.engine.build import abstract_state, build, jit_step
from flowlm.evaluation import evaluator as evaluation
from flowlm.runs import directory as run_directory
from flowlm.runs.checkpoint import Checkpoints, has_params
from flowlm.runs.curves import draw_curves
from flowlm.runs.metrics import MetricWriter, is_evaluated, read_metrics
from flowlm.runs.trained import load_origin, load_teacher
from flowlm.system import processes, signals, storage
from flowlm.system.profiling import Profiler, Recompilations


def train(config: ConfigDict, workdir: str, profile_steps: range = range(0)) -> None:
    """Trains the experiment to `config.steps` and evaluates it, taking up whatever `workdir` already holds.

    Told to stop (Ctrl-C, SIGTERM, SIGHUP), it saves and returns, from the middle of an evaluation too; before its first step
    nothing is new and it ends at once. Steps in `profile_steps` are traced into `workdir`/profile.

    Raises:
      ValueError, FileNotFoundError: bad settings, missing data, another experiment's workdir; before any expensive work.
      FloatingPointError: the loss, a gradient or a parameter is not finite; nothing already saved is lost.
    """
    experiment, layout, dataset, evaluator, teacher, origin = _prepare(config, workdir)

    # ---- The state is born sharded: shapes, then places, then values.
    abstract = abstract_state(experiment, layout)
    checkpoints = Checkpoints(storage.path(workdir) / "checkpoints", **config.checkpoint.to_dict())
    state = checkpoints.restore(abstract)
    if state is None:
        init = partial(train_state.init_state, experiment.net, experiment.family, experiment.optimizer, config.seed)
        state = jax.jit(init, out_shardings=jax.tree.map(lambda a: a.sharding, abstract))(teacher, origin)
    del origin
    first = int(state.step)
    if first > config.steps:
        raise ValueError(f"{workdir} is at step {first} already: set steps to more than that, not {config.steps}")
    parameters = sum(a.size for a in jax.tree.leaves(state.params))
    told = f"{parameters:,} parameters on {layout.mesh.size} device(s), from step {first} to {config.steps}"
    _say(told + (f", in {jax.process_count()} processes" if jax.process_count() > 1 else ""))

    step_fn = jit_step(config, experiment, layout, abstract)
    rows = dataset.train.shuffled(config.seed)
    judged = _is_judged(workdir, first)
    # Of several processes the first writes and prints what all of them know.
    leads = processes.is_first()
    writer = MetricWriter(workdir, start=first, tensorboard=config.tensorboard) if leads else None
    write = writer.write if leads else lambda step, values: None
    profiler = Profiler(profile_steps, storage.path(workdir) / "profile")
    recompilations = Recompilations(step_fn)
    progress = tqdm(
        total=config.steps, initial=first, unit="step", smoothing=0.05, dynamic_ncols=True, disable=not leads
    )

    # ---- save, evaluate, take batch, step, log the previous step's metrics.
    metrics, values, logged, clock = None, {}, first, time.perf_counter()
    unsaved = contextlib.ExitStack()
    try:
        for step in range(first, config.steps):
            stop = processes.preempted(step)
            save = step > first and (stop or checkpoints.should_save(step))
            evaluate = step % config.evaluation.every == 0 and (step > first or not judged)
            if step > first and (save or evaluate):
                values = _check_finite(metrics, step, checkpoints)
            if save:
                checkpoints.save(step, state)
            if evaluate and not stop:
                try:
                    write(step, evaluator(state.ema, step, config.evaluation.samples).metrics)
                    logged, clock = step, time.perf_counter()
                except processes.Stopped:  # the same command begins this evaluation anew
                    if step > first:
                        checkpoints.save(step, state)
                    stop = True
            if stop:
                if step > first:
                    write(step, values)
                progress.close()
                _say_stopped(f"at step {step}, from where the same command goes on")
                return

            profiler.before(step)
            previous = metrics
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                batch = sharding.global_rows(rows, step * config.batch_size, config.batch_size, dataset.length, layout)
                state, metrics = step_fn(state, batch, teacher)
            if step == first:
                unsaved.enter_context(signals.held())
            profiler.after(step, metrics)
            recompilations.check(step)
            progress.update()

            # Reading the previous step's numbers leaves the device busy with this one.
            if step > first and step % config.log_every == 0:
                values = _check_finite(previous, step, checkpoints)
                values["learning_rate"] = float(experiment.schedule(step - 1))
                if step > logged:  # not right after an evaluation
                    now = time.perf_counter()
                    values["tokens_per_second"] = (step - logged) * config.batch_size * dataset.length / (now - clock)
                    logged, clock = step, now
                write(step, values)
                progress.set_postfix(
                    loss=f"{values['loss']:.3f}", tokens_per_second=f"{values.get('tokens_per_second', 0):.0f}"
                )

        # ---- The end: the last state is saved before it is judged. A run that was finished already is only judged again.
        if metrics is not None:
            values = _check_finite(metrics, config.steps, checkpoints)
            checkpoints.save(config.steps, state)
        progress.close()
        try:
            result = evaluator(state.ema, config.steps, config.evaluation.final_samples)
        except processes.Stopped:
            if metrics is not None:
                write(config.steps, values)
            _say_stopped(f"all {config.steps} steps are saved, and the same command evaluates them")
            return
        if metrics is not None or not judged:
            write(config.steps, values | result.metrics)
        if leads:
            result.save(workdir)
            draw_curves(workdir)
            result.show()
    finally:
        progress.close()
        profiler.close()
        if leads:
            writer.close()
        checkpoints.close()
        unsaved.close()


def _say(text: str) -> None:
    if processes.is_first():
        print(text, file=sys.stderr)


def _say_stopped(text: str) -> None:
    if processes.is_first():
        signals.say_stopped(text)


def _prepare(config: ConfigDict, workdir: str):
    """(experiment, layout, dataset, evaluator, teacher or None, parameters to start from or None), and the run directory.

    Everything that can be wrong is found here, before anything is written or compiled for the training.
    """
    data = config.data
    tokenizer = tokenizers.shipped(data.tokenizer, data.dir)
    experiment = build(config, tokenizer.vocab_size, tokenizer.start)
    layout = sharding.make_layout(config)
    processes.check_mesh(layout.mesh)
    sharding.check_batch(config.batch_size, config.accumulation, experiment.family.group, layout.devices)
    teacher = load_teacher(config, tokenizer, experiment, layout) if config.teacher else None
    origin = load_origin(config, tokenizer, experiment, layout) if config.init_from else None
    if has_params(workdir):
        raise ValueError(f"{workdir} holds parameters alone, no training state: give another --workdir")
    run_directory.check_workdir(workdir, config, tokenizer)  # before data are prepared, which may take hours
    dataset = open_dataset(data.name, data.tokenizer, data.length, data.dir)
    run_directory.prepare_workdir(workdir, config, dataset.tokenizer)
    evaluator = evaluation.Evaluator(experiment, dataset, layout, config.seed, config.evaluation, data.dir)
    return experiment, layout, dataset, evaluator, teacher, origin


def _is_judged(workdir, step: int) -> bool:
    """Whether the evaluation of this step is in the metrics already, or there is none of it; the same in all processes."""
    lines = [line for line in read_metrics(workdir) if line["step"] == step]
    held = step == 0 or any(is_evaluated(name) for line in lines for name in line)
    return processes.all_agree(held)


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
