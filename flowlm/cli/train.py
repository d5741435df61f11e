"""`flowlm train`."""

from absl.flags import FlagValues

from flowlm.cli.command import Command, experiment, output, switch, text


def _train(values: FlagValues) -> None:
    import jax

    from flowlm.system import processes
    from flowlm.system.profiling import parse_steps
    from flowlm.training import train

    profile_steps = parse_steps(values.profile_steps)
    if values.compile_cache:
        jax.config.update("jax_compilation_cache_dir", values.compile_cache)
    processes.start(values.distributed)
    train(values.config, values.workdir, profile_steps)


TRAIN = Command(
    "train",
    "trains an experiment, or goes on with it where it was",
    [
        experiment("the experiment, with an argument of its own behind a colon"),
        output("workdir", "the run directory; a run found there is taken up again"),
        text("profile_steps", "A:B", "traces steps A to B - 1 into DIR/profile", ""),
        text("compile_cache", "DIR", "where compiled programs are kept for later starts"),
        switch("distributed", "one of several processes; only where JAX does not find the others itself"),
    ],
    _train,
    needs=("config", "workdir"),
    again="the same command goes on from where it was",
)
