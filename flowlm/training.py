"""The training loop, from top to bottom: every family and every command trains by it."""

import contextlib
import sys
import time
from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from flowlm.data import corpora, mixture, open_dataset, tokenizers
from flowlm.engine import sharding
from flowlm.engine import state as train_state
from flowlm.engine.build import Experiment, abstract_state, build, jit_step
from flowlm.engine.state import TrainState
from flowlm.evaluation import evaluator as evaluation
from flowlm.models.network import Params
from flowlm.objectives.base import Teacher
from flowlm.runs import boards
from flowlm.runs import directory as run_directory
from flowlm.runs.checkpoint import Checkpoints
from flowlm.runs.curves import draw_curves
from flowlm.runs.metrics import MetricWriter, is_evaluated, read_metrics
from flowlm.runs.trained import check_one_embedding, has_parameters_alone, load_origin, load_teacher
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

    abstract = abstract_state(experiment, layout)
    checkpoints = Checkpoints(storage.path(workdir) / "checkpoints", **config.checkpoint.to_dict())
    state = checkpoints.restore(abstract)
    if state is None:
        state = _born(experiment, abstract, config.seed, teacher, origin)
    del origin
    first, every = int(state.step), config.evaluation.every
    if first > config.steps:
        raise ValueError(f"{workdir} is at step {first} already: set steps to more than that, not {config.steps}")
    _say_begun(state, layout, config.steps)

    step_fn = jit_step(config, experiment, layout, abstract)
    rows = mixture.shuffled(dataset, config.data.mixture, config.seed, config.data.copy)
    judged = _is_judged(workdir, first)
    log = _Log(config, workdir, first, config.batch_size * dataset.length)
    profiler = Profiler(profile_steps, storage.path(workdir) / "profile")
    recompilations = Recompilations(step_fn)

    # ---- save, evaluate, take batch, step, log the previous step's metrics.
    metrics, values, unsaved = None, {}, contextlib.ExitStack()
    try:
        for step in range(first, config.steps):
            stop = processes.preempted(step)
            save = step > first and (stop or checkpoints.should_save(step))
            evaluate = every > 0 and step % every == 0 and (step > first or not judged)
            if step > first and (save or evaluate):
                values = _check_finite(metrics, step, checkpoints)
            if save:
                checkpoints.save(step, state)
            if evaluate and not stop:
                try:
                    log.evaluation(evaluator(state.ema, step, config.evaluation.samples))
                except processes.Stopped:  # the same command begins this evaluation anew
                    if step > first:
                        checkpoints.save(step, state)
                    stop = True
            if stop:
                if step > first:
                    log.write(step, values)
                log.say_stopped(f"at step {step}, from where the same command goes on")
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
            log.progress.update()

            # Only the previous step's numbers are read, so that the device is busy with this step meanwhile.
            if step > first and step % config.log_every == 0:
                values = _check_finite(previous, step, checkpoints)
                log.training(step, values | {"learning_rate": float(experiment.schedule(step - 1))})

        # ---- The end: the last state is saved before it is judged. A run that was finished already is only judged again.
        if metrics is not None:
            values = _check_finite(metrics, config.steps, checkpoints)
            checkpoints.save(config.steps, state)
        _judge(config, workdir, evaluator, state, values, judged, log)
    finally:
        log.close()
        profiler.close()
        checkpoints.close()
        unsaved.close()


def _born(
    experiment: Experiment, abstract: TrainState, seed: int, teacher: Teacher | None, origin: Params | None
) -> TrainState:
    """A fresh state. Each device computes its own shards, so that no device ever holds the whole of a large state."""
    init = partial(train_state.init_state, experiment.net, experiment.family, experiment.optimizer, seed)
    return jax.jit(init, out_shardings=jax.tree.map(lambda a: a.sharding, abstract))(teacher, origin)


def _judge(
    config: ConfigDict,
    workdir: str,
    evaluator: evaluation.Evaluator,
    state: TrainState,
    values: dict,
    judged: bool,
    log: "_Log",
) -> None:
    """Evaluates the run after its last step. `values` are that step's numbers; there are none if it was finished already."""
    log.progress.close()
    try:
        result = evaluator(state.ema, config.steps, config.evaluation.final_samples, final=True)
    except processes.Stopped:
        if values:
            log.write(config.steps, values)
        log.say_stopped(f"all {config.steps} steps are saved, and the same command evaluates them")
        return
    if values or not judged:
        log.write(config.steps, values | result.metrics, result.texts)
    if processes.is_first():
        result.save(workdir)
        draw_curves(workdir)
        result.show()


class _Log:
    """What a run tells of itself: lines of metrics, and its progress at the terminal.

    Of several processes the first writes and prints what all of them know.
    """

    def __init__(self, config: ConfigDict, workdir: str, first: int, tokens: int):
        """tokens: how many a step reads."""
        leads = processes.is_first()
        self._writer = MetricWriter(workdir, first, boards.boards_of(config, workdir)) if leads else None
        self.progress = tqdm(
            total=config.steps, initial=first, unit="step", smoothing=0.05, dynamic_ncols=True, disable=not leads
        )
        self._tokens, self._last, self._clock = tokens, first, time.perf_counter()

    def write(self, step: int, values: dict[str, float], texts: dict[str, list[str]] | None = None) -> None:
        """A line of metrics, and samples for the boards."""
        if self._writer is not None:
            self._writer.write(step, values, texts or {})

    def evaluation(self, result: evaluation.Evaluation) -> None:
        """The line of an evaluation. Its time does not count for the speed of training."""
        self.write(result.step, result.metrics, result.texts)
        self._last, self._clock = result.step, time.perf_counter()

    def training(self, step: int, values: dict[str, float]) -> None:
        """The line of a step, with the speed since the line before; right after an evaluation there is none."""
        if step > self._last:
            now = time.perf_counter()
            values = values | {"tokens_per_second": (step - self._last) * self._tokens / (now - self._clock)}
            self._last, self._clock = step, now
        self.write(step, values)
        self.progress.set_postfix(
            loss=f"{values['loss']:.3f}", tokens_per_second=f"{values.get('tokens_per_second', 0):.0f}"
        )

    def say_stopped(self, where: str) -> None:
        """Says behind the progress that the run was told to stop."""
        self.progress.close()
        if processes.is_first():
            signals.say_stopped(where)

    def close(self) -> None:
        self.progress.close()
        if self._writer is not None:
            self._writer.close()


def _say_begun(state: TrainState, layout: sharding.Layout, steps: int) -> None:
    if not processes.is_first():
        return
    parameters = sum(a.size for a in jax.tree.leaves(state.params))
    told = f"{parameters:,} parameters on {layout.mesh.size} device(s), from step {int(state.step)} to {steps}"
    print(told + (f", in {jax.process_count()} processes" if jax.process_count() > 1 else ""), file=sys.stderr)


def _prepare(config: ConfigDict, workdir: str):
    """(experiment, layout, dataset, evaluator, teacher or None, parameters to start from or None), and the run directory.

    Everything that can be wrong is found here, before anything is written or compiled for the training.
    """
    data = config.data
    tokenizer = tokenizers.shipped(data.tokenizer, data.dir)
    boards.check(config)
    experiment = build(config, tokenizer.vocab_size, tokenizer.start)
    mixture.check_folders(data.mixture, tokenizer.sha256, data.length, corpora.is_padded(data.name))
    layout = sharding.make_layout(config)
    processes.check_mesh(layout.mesh)
    sharding.check_batch(config.batch_size, config.accumulation, experiment.family.group, layout.devices)
    teacher = load_teacher(config, tokenizer, experiment, layout) if config.teacher else None
    starts = config.init_from or experiment.family.continues
    origin = load_origin(config, tokenizer, experiment, layout) if starts else None
    if teacher and origin and experiment.family.continues:
        check_one_embedding(config, teacher, origin)
    if has_parameters_alone(workdir):
        raise ValueError(f"{workdir} holds parameters alone, no training state: give another --workdir")
    run_directory.check_workdir(workdir, config, tokenizer)  # before data are prepared, which may take hours
    dataset = open_dataset(data.name, data.tokenizer, data.length, data.dir, copy=data.copy)
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
