"""Flags that say which run is sampled, and how, for the commands that do so."""

import ast
from collections.abc import Sequence

from absl.flags import FlagValues

from flowlm.cli.command import text, whole, words

CHECKPOINT = text("checkpoint", "DIR", "a trained run, what was exported of one, or hub:NAME/MODEL[@REVISION]")
OBJECTIVE = words("objective", "KEY=VALUE,...", "settings in place of the run's, as temperature=0.8,gamma=1", [])
SAMPLER = text("sampler", "NAME", "one of the family's samplers; the last of them if none is named")
SEED = whole("seed", "the seed of the noise", 0, 0, 2**32 - 1)


def step_counts(values: FlagValues, default: Sequence[int]) -> list[int]:
    """--steps as numbers of network calls. Raises ValueError: they are none."""
    counts = values.steps or [str(count) for count in default]
    if not all(count.isdigit() and int(count) > 0 for count in counts):
        raise ValueError(f"--steps takes positive whole numbers, got {','.join(counts)!r}")
    return [int(count) for count in counts]


def changed_objective(values: FlagValues) -> dict[str, object]:
    """--objective as settings. Raises ValueError where one has no value."""
    changes = {}
    for change in values.objective:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--objective takes KEY=VALUE,..., got {change!r}")
        try:
            changes[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[key] = value
    return changes
