"""What evaluating takes on paper: the work of an evaluation, counted elsewhere, times what each part of it takes.

Devices: the roofline of the programs that were compiled. Hosts: rates that were measured on one core, of what is fitted and of the
judges that count; CHIPS_OF_A_HOST share a host, and hosts divide the judging. Not in it are pretrained judges, compiling, and
what a disk or a bucket takes.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from flowlm.scale.ahead_of_time import planned_steps, total

# The budgets: of the start beside prepared data, seconds; of one evaluation, the time of so many training steps.
START_SECONDS, TRAINING_STEPS = 120, 500
CHIPS_OF_A_HOST = 4
# Seconds of one core that were measured, on rows of 1,024 ids of a vocabulary of 50,257: to read an id of a row; to count one by
# position, and to make an entry of the table of these counts; to count the n-grams that end at one; to fit the model of
# characters, and the words, to a character; to judge an id of a row.
READ, POSITION, ENTRY, NGRAMS, CHARACTERS, JUDGED = 7e-8, 2.2e-7, 2e-8, 5e-7, 3e-7, 1e-5
VERIFIED = 1e9  # bytes a second of what was kept, whose digest is taken whenever it is read


def likelihood_program(name: str) -> str:
    """What the program of a likelihood is called among those of a plan."""
    return "held_out" if name == "bound" else name


def evaluation_costs(
    config: ConfigDict, point: Mapping[str, Any], evaluating: Callable[[int], Mapping[str, Any]]
) -> dict[str, Any]:
    """What a run's start and its evaluations take: the work of each, and an estimate, as numbers for JSON.

    Args:
      point: the programs of one topology.
      evaluating: rows of a sampler's call -> {start, often, final: what flowlm/evaluation/work.py counts, followed: rows}.
    """
    work = evaluating(int(point["sample"]["rows"]) if "sample" in point else 1)
    start = dict(work["start"]) | _start(work["start"], config.data.length, config.model.vocab_size)
    programs = [
        point[name] for name in ("sample", *map(likelihood_program, work["often"]["likelihoods"])) if name in point
    ]
    out = {"start": start, "hbm": max(map(total, programs), default=0.0)}
    for name in ("often", "final"):
        out[name] = dict(work[name]) | _evaluation(config, work[name], point, work["followed"])
    return out


def _start(start: Mapping[str, Any], length: int, vocab: int) -> dict[str, float]:
    """Seconds of a host before the first step: the first time, and from then on. Bytes that it needs meanwhile, at most."""
    positions = start["marginal_rows"] * length
    fitting = positions * (READ + POSITION) + (length * vocab * ENTRY if positions else 0)
    fitting += start["counted_rows"] * length * (READ + NGRAMS) + start["characters"] * CHARACTERS
    again = start["held_out_rows"] * length * READ + start["table_bytes"] / VERIFIED
    return {
        "seconds": fitting + again,
        "again_seconds": again,
        "host_bytes": start["table_bytes"] + start["fitting_bytes"],
    }


def _evaluation(
    config: ConfigDict, work: Mapping[str, Any], point: Mapping[str, Any], followed: int
) -> dict[str, float]:
    """Seconds of one evaluation on devices and on hosts, and as a share of TRAINING_STEPS; nothing where a program does not fit."""
    programs = [likelihood_program(name) for name in work["likelihoods"]] + ["sample"] * bool(work["network_calls"])
    if any("roofline" not in point[name] for name in ("train", *programs)):
        return {}

    def seconds(name: str) -> float:
        return point[name]["roofline"]["estimate"]

    device = sum(calls * seconds(likelihood_program(name)) for name, calls in work["likelihoods"].items())
    if work["network_calls"]:
        call = seconds("sample") / planned_steps(config)
        device += call * (
            work["network_calls"] + work["followed_calls"] * min(1.0, followed / point["sample"]["per_chip"])
        )
    hosts, length = math.ceil(point["train"]["chips"] / CHIPS_OF_A_HOST), config.data.length
    host = work["judged_rows"] * length * JUDGED / hosts
    return {"device": device, "host": host, "share": (device + host) / (TRAINING_STEPS * seconds("train"))}
