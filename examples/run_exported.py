"""Text from a model that `flowlm export --format=jax` wrote. Needs jax, flatbuffers, numpy and tokenizers; not flowlm.

usage: python run_exported.py DIRECTORY NUMBER_OF_SAMPLES SEED
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
    for name, digest in json.loads((directory / "manifest.json").read_text())["sha256"].items():
        if hashlib.sha256((directory / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{directory / name} is not the file that was exported")
    program = export.deserialize(bytearray((directory / "sampler.jax").read_bytes()))
    with np.load(directory / "weights.npz", allow_pickle=False) as file:
        weights = dict(file)
    return program.call, weights, tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


if __name__ == "__main__":
    directory, number, seed = sys.argv[1:]
    sampler, weights, tokenizer = load(directory)
    ids = sampler(weights, np.uint32(seed), np.zeros(int(number), np.int32))
    print(*tokenizer.decode_batch(np.asarray(ids).tolist()), sep="\n")
