"""Translates parameters to and from the names of the reference network (2602.16813, PyTorch).

A reference parameter is found by its path here: MODULES names the module, LEAVES the array in it. PyTorch keeps matrices as
[out, in] and every block's arrays apart, here they are [in, out] and stacked. What the reference has no name for
(further inputs of a network) keeps the one it has here, so every network has a form in these names.

Masked diffusion: here the mask stands behind all tokens and is never predicted. The reference has a row of the output matrix
for it, whose logit it replaces by -inf: that row is zero on the way out and dropped on the way in.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flowlm.models.network import Network, Params

MODULES = {
    "embedding": "vocab_embed.embedding",
    "time_s/in": "sigma_map.mlp.0",
    "time_s/out": "sigma_map.mlp.2",
    "time_t/in": "sigma_map_prime.mlp.0",
    "time_t/out": "sigma_map_prime.mlp.2",
    "blocks/norm1": "blocks.{}.norm1",
    "blocks/qkv": "blocks.{}.attn_qkv",
    "blocks/out": "blocks.{}.attn_out",
    "blocks/norm2": "blocks.{}.norm2",
    "blocks/mlp_in": "blocks.{}.mlp.0",
    "blocks/mlp_out": "blocks.{}.mlp.2",
    "blocks/modulation/linear": "blocks.{}.adaLN_modulation",
    "norm": "output_layer.norm_final",
    "unembed_kernel": "output_layer.linear.weight",
    "unembed_bias": "output_layer.linear.bias",
    "modulation/linear": "output_layer.adaLN_modulation",
}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
OUTPUT = MODULES["unembed_kernel"], MODULES["unembed_bias"]  # arrays of the reference that have a row for the mask
# Settings of the `model` section that the reference does not know.
BARE = dict(input="raw", preview=False, output="plain", time_scale=1.0, end_time_scale=1.0, gate_init=0.0)
BARE |= dict(learned_positions=False, loss_weight=False)


def _name(path: str) -> str:
    """The reference's name of a path here, with {} for the number of a block."""
    module, _, leaf = path.rpartition("/")
    if path in MODULES:
        return MODULES[path]
    return f"{MODULES.get(module, module.replace('/', '.'))}.{LEAVES.get(leaf, leaf)}".lstrip(".")


def _is_matrix(path: str) -> bool:
    return path.rpartition("/")[2] in ("kernel", "unembed_kernel")


def _has_mask(params) -> bool:
    return params["embedding"].shape[0] == params["unembed_bias"].shape[0] + 1


def to_reference(params: Params) -> dict[str, jax.Array]:
    """A parameter tree as the reference's {name: array}."""
    arrays = {}
    for path, value in flatten_dict(params, sep="/").items():
        stacked = path.startswith("blocks/")
        if _is_matrix(path):  # the heads of qkv are one axis there
            value = jnp.swapaxes(value.reshape(*value.shape[: stacked + 1], -1), -1, -2)
        arrays |= {_name(path).format(i): value[i] for i in range(len(value))} if stacked else {_name(path): value}
    if _has_mask(params):
        arrays |= {name: jnp.pad(arrays[name], [(0, 1)] + [(0, 0)] * (arrays[name].ndim - 1)) for name in OUTPUT}
    return arrays


def from_reference(arrays: Mapping[str, np.ndarray], net: Network, source: str) -> Params:
    """The parameter tree, float32, of a network in the reference's names. Every array is used and every parameter filled.

    Raises:
      ValueError: arrays are missing, superfluous or misshapen; lists all of them, and says that they are from `source`.
    """
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    wanted = {name: a.shape for name, a in jax.eval_shape(to_reference, shapes).items()}
    found = {name: a.shape for name, a in arrays.items()}
    wrong = {
        "missing": sorted(wanted.keys() - found.keys()),
        "not known": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {found[name]} instead of {wanted[name]}"
            for name in sorted(wanted.keys() & found.keys())
            if wanted[name] != found[name]
        ],
    }
    if any(wrong.values()):
        listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"the arrays of {source} are not those of the network it describes. {listed}")
    arrays = {name: np.asarray(a, np.float32) for name, a in arrays.items()}
    if _has_mask(shapes):
        arrays |= {name: arrays[name][:-1] for name in OUTPUT}
    params = {}
    for path, shape in flatten_dict(shapes, sep="/").items():
        name = _name(path)
        stacked = path.startswith("blocks/")
        value = np.stack([arrays[name.format(i)] for i in range(shape.shape[0])]) if stacked else arrays[name]
        value = np.swapaxes(value, -1, -2) if _is_matrix(path) else value
        params[path] = jnp.asarray(value.reshape(shape.shape))
    return unflatten_dict(params, sep="/")
