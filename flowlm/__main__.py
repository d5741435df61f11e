"""The entry of the `flowlm` command, and of `python -m flowlm`: signals are heard before the imports, which take seconds."""

from flowlm.system import signals


def run() -> None:
    """Carries out the command line of this process."""
    signals.listen()
    from flowlm import main

    main.run()


if __name__ == "__main__":
    run()
