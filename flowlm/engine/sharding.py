"""Where arrays live: the mesh, the batch and the state. It is decided here, so that the model need not know of it.

Mesh axes: `replica` and `data` split the batch; with `fsdp` the axis `data` also splits parameters, moving average and moments;
`model` splits heads, hidden layers and the vocabulary. RULES says along which axes each array of a state is split.

A training step's loss and gradient run on each device's own rows (`Layout.on_rows`), so that one step reduces each gradient once,
and chunks of the vocabulary (vocab.py) need no talk between devices that split the batch:

    data parallel   gradients are summed over (replica, data) at the end of the step, once whatever the accumulation
    fsdp            a parameter is gathered over `data` where it is used, a block's inside the loop over blocks, and its gradient
                    comes back by reduce-scatter; the shards' gradients are summed over replicas at the end
    model           left to XLA's partitioner inside of that
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from flowlm.models.attention import runs_on
from flowlm.models.network import Params, Transformer

ROWS = ("replica", "data")

# (pattern of a path, axes of its last dimensions). `data` counts under fsdp only. An axis that does not divide its dimension is
# left out, but a vocabulary that `model` does not divide is stored along the other dimension instead (see `stored`).
RULES: tuple[tuple[str, tuple], ...] = (
    (r"(^|/)embedding$", ("model", "data")),
    (r"(^|/)unembed_kernel$", ("data", "model")),
    (r"(^|/)(unembed_bias|log_prior)$", ("model",)),
    (r"(^|/)positions$", (None, "data")),
    (r"(^|/)mix_\w+/kernel$", ("data", None)),
    (r"blocks/qkv/kernel$", ("data", None, "model", None)),
    (r"blocks/mlp_in/kernel$", ("data", "model")),
    (r"blocks/mlp_in/bias$", ("model",)),
    (r"blocks/(out|mlp_out)/kernel$", ("model", "data")),
    (r"blocks/modulation/linear/kernel$", (None, "data")),
    (r"", ()),
)
# Only these weights of products are gathered in model.dtype; all others are gathered in float32.
PRODUCTS = re.compile(r"(blocks/(qkv|out|mlp_in|mlp_out)/kernel|(^|/)unembed_kernel)$")


def path_of(path: Sequence[Any]) -> str:
    """A tree path as `a/b/c`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def make_mesh(replica: int = 1, data: int = -1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of replica x data x model devices; one of them may be -1, what is left. Slices, where there are several, are replicas.

    Args:
      devices: all of this run's by default.

    Raises:
      ValueError: the devices are fewer, or do not divide so.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape, names = [replica, data, model], ("replica", "data", "model")
    shown = ", ".join(f"mesh.{name} = {size}" for name, size in zip(names, shape))
    known = int(np.prod([size for size in shape if size != -1]))
    if shape.count(-1) > 1 or min(size for size in (*shape, 1) if size != -1) < 1:
        raise ValueError(f"{shown}: each is a number of devices, at least 1, and one of them may be -1, what is left")
    if -1 in shape:
        if known > len(devices) or len(devices) % known:
            raise ValueError(
                f"{shown}, but {len(devices)} devices are here, no multiple of {known}: choose sizes that multiply to it"
            )
        shape[shape.index(-1)] = len(devices) // known
    size = int(np.prod(shape))
    if size > len(devices):
        raise ValueError(
            f"{shown}, but {len(devices)} devices are here: set mesh.data to -1, or sizes that multiply to at most that"
        )
    devices = devices[:size]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if shape[0] % slices:
            raise ValueError(
                f"{shown}, but the devices lie on {slices} slices: make mesh.replica a multiple of {slices}"
            )
        inside = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Linen's contractions fail on the Explicit axes that make_mesh gives by default.
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * 3)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(shard: jax.Array, dim: int, wire: str, reduce: str) -> jax.Array:
    """The whole of an array of which every device along `data` holds a shard of dimension `dim`.

    It travels as `wire`; its gradient is summed and cut again, travelling as `reduce`.
    """
    return jax.lax.all_gather(shard.astype(wire), "data", axis=dim, tiled=True).astype(shard.dtype)


def _gather_forward(shard, dim, wire, reduce):
    return _gather(shard, dim, wire, reduce), None


def _gather_backward(dim, wire, reduce, _, gradient):
    part = jax.lax.psum_scatter(gradient.astype(reduce), "data", scatter_dimension=dim, tiled=True)
    return (part.astype(gradient.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


@dataclass(frozen=True)
class Layout:
    """A mesh, and how the arrays of a state are spread over it.

    Attributes:
      fsdp: split parameters, moving average and moments over `data`.
      grad_reduce_dtype: what gradients are summed in across devices, float32 or bfloat16.
      dtype: model.dtype, what gathered matrices travel in.
    """

    mesh: Mesh
    fsdp: bool = False
    grad_reduce_dtype: str = "float32"
    dtype: str = "float32"

    @property
    def devices(self) -> int:
        """How many devices the batch is split over."""
        return self.mesh.shape["replica"] * self.mesh.shape["data"]

    @property
    def platform(self) -> str:
        """cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform

    @property
    def rows(self) -> NamedSharding:
        """The sharding of a global batch [B, ...]."""
        return NamedSharding(self.mesh, P(ROWS))

    def stored(self, path: str, shape: tuple[int, ...]) -> P:
        """The axes along which an array of the state is stored."""
        wanted = next(axes for pattern, axes in RULES if re.search(pattern, path))
        lead = len(shape) - len(wanted)
        axes: list[Any] = [None] * lead + [None if axis == "data" and not self.fsdp else axis for axis in wanted]

        def fits(axis, size):
            return size % self.mesh.shape[axis] == 0

        model, data = self.mesh.shape["model"], self.mesh.shape["data"] if self.fsdp else 1
        for i, axis in enumerate(axes):
            if axis is None or self.mesh.shape[axis] == 1:
                axes[i] = None
            elif not fits(axis, shape[i]):
                axes[i] = None
                other = lead + 1 - (i - lead)
                if axis == "model" and len(wanted) == 2 and shape[other] % (model * data) == 0:
                    axes[other] = ("data", "model") if data > 1 else "model"
                    break
        return P(*axes)

    def used(self, path: str, shape: tuple[int, ...]) -> P:
        """The axes along which a program uses that array: never `data`; `model` even where that leaves unequal parts."""
        wanted = next(axes for pattern, axes in RULES if re.search(pattern, path))
        lead = len(shape) - len(wanted)

        def uneven(axis, size):
            return axis == "model" and size >= self.mesh.shape["model"] > 1

        return P(*[None] * lead, *(a if uneven(a, n) else None for a, n in zip(wanted, shape[lead:])))

    def places(self, tree: Any) -> Any:
        """The sharding of every array of a tree of shapes: parameters, moving average, moments, or a whole state."""
        return _map_named(lambda name, a: NamedSharding(self.mesh, self.stored(name, a.shape)), tree)

    def whole(self, params: Params) -> Params:
        """Parameters that any jitted program can use: each device has all of them, but for what `model` splits."""

        def used(name, a):
            return NamedSharding(self.mesh, self.used(name, a.shape))

        return _map_named(lambda name, a: jax.lax.with_sharding_constraint(a, used(name, a)), params)

    def jit(self, fn: Callable, **options: Any) -> Callable:
        """jax.jit of fn(params, ...) with params made whole: for samplers and likelihoods, not for the training step."""

        def run(params, *args):
            # Kernels look up the mesh in the context, because they are called by shard_map.
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return fn(self.whole(params), *args)

        return jax.jit(run, **options)

    def on_rows(self, fn: Callable, net: Transformer, names: tuple[str, ...]) -> Callable:
        """fn(net, whole, params, aux, batch) -> (metrics, {name of names: gradient like params}) on each device's own rows.

        `whole` gathers all parameters outside of the blocks; the net that fn is given gathers those of a block inside the loop
        over blocks. Metrics and gradients are averaged over devices, and each gradient lies like its parameter.
        """
        # Without a model axis every axis is manual, because then kernels can be called as they are.
        manual = ROWS if self.mesh.shape["model"] > 1 else self.mesh.axis_names

        def spread(params, aux, batch):
            shapes = _shapes(params) | _shapes(aux)

            def by_hand(name, a):
                return P(*(_cut(axis) for axis in self.stored(name, a.shape)))

            specs = _map_named(by_hand, params), _map_named(by_hand, aux)

            def whole(tree):
                return _map_named(lambda name, a: a if "blocks/" in name else self._used(name, a, shapes[name]), tree)

            def gathering(net, params):
                if not self.fsdp:
                    return net
                block = {
                    name.split("blocks/")[1]: shape[1:] for name, shape in _shapes(params).items() if "blocks/" in name
                }
                return net.gathering(
                    lambda tree: _map_named(lambda name, a: self._used(f"blocks/{name}", a, block[name]), tree)
                )

            mine, teacher = gathering(net, params), aux.teacher
            # A teacher that has a network of its own has blocks of its own shapes.
            theirs = gathering(teacher.net, teacher.flow) if teacher is not None and teacher.net is not None else None

            def local(params, aux, batch):
                if theirs is not None:
                    aux = aux._replace(teacher=aux.teacher._replace(net=theirs))
                metrics, gradients = fn(mine, whole, params, aux, batch)

                def reduce(name, g):
                    cut = self._dim(name, shapes[name])
                    total = jax.lax.psum(g.astype(self.grad_reduce_dtype), ROWS if cut is None else "replica")
                    return total.astype(g.dtype) / self.devices

                return jax.lax.pmean(metrics, ROWS), {k: _map_named(reduce, g) for k, g in gradients.items()}

            return jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(*specs, P(ROWS)),
                out_specs=(P(), dict.fromkeys(names, specs[0])),
                axis_names=set(manual),
                check_vma=False,
            )(params, aux, batch)

        return spread

    def _dim(self, name: str, shape: tuple[int, ...]) -> int | None:
        """The dimension of an array that is cut over `data`, if one is."""
        return next((i for i, axis in enumerate(self.stored(name, shape)) if _cut(axis)), None)

    def _used(self, name: str, shard: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The whole of a shard, on each device's own rows."""
        dim = self._dim(name, shape)
        if dim is not None:
            wire = self.dtype if PRODUCTS.search(name) else "float32"
            shard = _gather(shard, dim, wire, self.grad_reduce_dtype)
        spec, model = self.used(name, shape), self.mesh.shape["model"]
        if any(size % model for size, axis in zip(shape, spec) if axis):
            shard = jax.lax.with_sharding_constraint(shard, NamedSharding(jax.sharding.get_abstract_mesh(), spec))
        return shard


def _cut(axis) -> str | None:
    """`data` where one dimension's axes hold it, because on each device's own rows that axis is cut by hand; otherwise None."""
    return "data" if axis == "data" or (isinstance(axis, tuple) and "data" in axis) else None


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    return {path_of(path): a.shape for path, a in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _map_named(fn: Callable, tree):
    """fn(path of a leaf as a/b/c, leaf) over a tree."""
    return jax.tree_util.tree_map_with_path(lambda path, a: fn(path_of(path), a), tree)


def make_layout(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The layout of an experiment over these devices, all by default.

    Raises:
      ValueError: a mesh that does not fit the devices or the network, or an unknown type to reduce gradients in.
    """
    wanted = config.mesh
    if wanted.grad_reduce_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"unknown mesh.grad_reduce_dtype {wanted.grad_reduce_dtype!r}: choose float32 or bfloat16")
    mesh = make_mesh(wanted.replica, wanted.data, wanted.model, devices)
    if config.model.heads % mesh.shape["model"]:
        raise ValueError(
            f"mesh.model = {mesh.shape['model']} does not divide model.heads = {config.model.heads}: attention is split by heads"
        )
    data, width = mesh.shape["data"], config.model.width
    if wanted.fsdp and width % data:
        fits = max(n for n in range(1, data + 1) if width % n == 0 and data % n == 0)
        raise ValueError(
            f"mesh.fsdp splits matrices along model.width = {width}, which mesh.data = {data} does not divide: "
            f"set mesh.data={fits} and mesh.replica=-1"
        )
    layout = Layout(mesh, wanted.fsdp, wanted.grad_reduce_dtype, config.model.dtype)
    if not runs_on(config.model.attention, layout.platform):
        raise ValueError(
            f"model.attention {config.model.attention} does not run on {layout.platform}: set --config.model.attention=xla"
        )
    return layout


def check_batch(batch_size: int, accumulation: int, group: int, devices: int) -> None:
    """Raises ValueError unless the global batch divides over microbatches, devices and groups of rows that stay together."""
    parts = accumulation * devices * group
    below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
    listed = f"{below} or {above}" if below > 0 else f"{above}"
    if batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of accumulation {accumulation} x {devices} devices"
            f"{f' x groups of {group} rows (objective.diagonal)' if group > 1 else ''}: "
            f"use {listed}"
        )


def global_rows(
    rows: Callable[[int, int], np.ndarray], start: int, batch_size: int, length: int, layout: Layout
) -> jax.Array:
    """Rows start .. start + batch_size of an endless stream as one global array [batch_size, length], split over devices.

    Args:
      rows: (start, stop) -> int32 [stop - start, length]; each host asks only for what its devices hold, and at once where these
        rows are neighbours, because a question to a bucket takes as long for one row as for many.
    """
    shape = (batch_size, length)
    held = layout.rows.addressable_devices_indices_map(shape).values()
    spans = sorted({index[0].indices(batch_size)[:2] for index in held})
    if all(end == begin for (_, end), (begin, _) in itertools.pairwise(spans)):
        spans = [(spans[0][0], spans[-1][1])]
    blocks = {span: np.asarray(rows(start + span[0], start + span[1]), np.int32) for span in spans}

    def part(index):
        first, last, _ = index[0].indices(batch_size)
        begin, end = next(span for span in spans if span[0] <= first and last <= span[1])
        return blocks[begin, end][first - begin : last - begin]

    return jax.make_array_from_callback(shape, layout.rows, part)
