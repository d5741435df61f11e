"""Text from a model that `flowlm export --format=jax` wrote. Needs jax, flatbuffers, numpy and tokenizers; not flowlm.

usage: python examples/run_exported.py DIRECTORY NUMBER_OF_SAMPLES SEED
"""

import hashlib
import json
import pathlib
import sys

import numpy as np
import tokenizers
from jax import export


def load(directory):
    """(sampler, weights, tokenizer) of a directory whose files are what its manifest says."""
    directory = pathlib.Path(directory)
    if not (directory / "sampler.jax").is_file():
        raise ValueError(
            f"there is no sampler.jax in {directory}: give a directory that `flowlm export --format=jax` wrote"
        )
    manifest = json.loads((directory / "manifest.json").read_text())
    if "sha256" not in manifest:
        raise ValueError(f"{directory} was not written to its end: remove it and export again")
    for name, digest in manifest["sha256"].items():
        if hashlib.sha256((directory / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{directory / name} is not the file that was exported")
    program = export.deserialize(bytearray((directory / "sampler.jax").read_bytes()))
    with np.load(directory / "weights.npz", allow_pickle=False) as file:
        weights = dict(file)
    return program.call, weights, tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


def main(directory, number, seed):
    """Prints as many samples as asked for."""
    sampler, weights, tokenizer = load(directory)
    ids = sampler(weights, np.uint32(seed), np.zeros(number, np.int32))
    print(*tokenizer.decode_batch(np.asarray(ids).tolist()), sep="\n")


if __name__ == "__main__":
    directory, *numbers = sys.argv[1:] or [""]
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        sys.exit(__doc__.splitlines()[-1])
    try:
        main(directory, *map(int, numbers))
    except (OSError, ValueError) as error:
        sys.exit(f"run_exported: {error}")
