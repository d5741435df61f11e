"""Costs read from HLO text are those counted by hand: all runs of a loop, all spellings of a group, a chain of fusions once."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from flowlm.scale import hlo

LOOP = """HloModule jit_step, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p = (s32[], f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[16]{0} get-tuple-element(%p), index=1
  %permute = f32[16]{0} collective-permute(%x), channel_id=4, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (s32[], f32[16]{0}) tuple(%next, %permute)
}

%inner_condition (p: (s32[], f32[16])) -> pred[] {
  %p = (s32[], f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[1024], /*index=2*/f32[16])) -> (s32[], f32[1024], f32[16]) {
  %p = (s32[], f32[1024]{0}, /*index=2*/f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[1024]{0} get-tuple-element(%p), index=1
  %reduced = f32[1024]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  %y = f32[16]{0} get-tuple-element(%p), index=2
  %two = s32[] constant(2)
  %start = (s32[], f32[16]{0}) tuple(%two, %y)
  %inner = (s32[], f32[16]{0}) while(%start), condition=%inner_condition, body=%inner_body
  %z = f32[16]{0} get-tuple-element(%inner), index=1
  ROOT %out = (s32[], f32[1024]{0}, f32[16]{0}) tuple(%next, %reduced, %z)
}

%fused_test (i: s32[], n: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %n = s32[] parameter(1)
  ROOT %lt.2 = pred[] compare(%i, %n), direction=LT
}

%condition (p: (s32[], f32[1024], f32[16])) -> pred[] {
  %p = (s32[], f32[1024]{0}, f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(5)
  ROOT %test = pred[] fusion(%i, %n), kind=kLoop, calls=%fused_test
}

ENTRY %main (x: f32[1024], y: f32[16], w: bf16[64]) -> f32[1024] {
  %x = f32[1024]{0:T(1024)} parameter(0)
  %y = f32[16]{0} parameter(1)
  %w = bf16[64]{0} parameter(2)
  %zero = s32[] constant(0)
  %copied = s32[] copy(%zero)
  %start = (s32[], f32[1024]{0}, f32[16]{0}) tuple(%copied, %x, %y)
  %loop = (s32[], f32[1024]{0}, f32[16]{0}) while(%start), condition=%condition, body=%body
  %gathered = bf16[256]{0} all-gather(%w), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
  %scattered = f32[128]{0} reduce-scatter(%x), replica_groups=mesh['a'=4,'b'=2] {'a','b'}, dimensions={0}, to_apply=%sum
  %swapped = f32[1024]{0} all-to-all(%x), replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
  %alone = f32[1024]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%sum
  ROOT %done = f32[1024]{0} get-tuple-element(%loop), index=1
}
"""


def totals(text):
    out = {}
    for each in hlo.collectives(hlo.parse(text)):
        count, size, wire = out.get(each.kind, (0, 0, 0))
        out[each.kind] = count + each.times, size + each.times * each.bytes, wire + each.times * each.wire
    return out


def test_collectives_are_counted_as_often_as_their_loops_run():
    assert totals(LOOP) == {
        "all-reduce": (5, 5 * 4096, 5 * 4096 * 2 * 3 / 4),
        "collective-permute": (5 * 5, 25 * 64, 25 * 64),  # the inner counter goes from 2 to 7
        "all-gather": (1, 128, 128 * 3),
        "reduce-scatter": (1, 4096, 4096 * 7 / 8),
        "all-to-all": (1, 4096, 4096 / 2),
    }


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,2},{1,3}}", 2),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['x'=2,'y'=8] {'x','y'}", 16),
        ("replica_groups=mesh['x'=2,'y'=8] {'y':(2)4}", 4),
        ("replica_groups={}", 32),
        ("dimensions={0}", 32),
    ],
)
def test_group_sizes(groups, size):
    assert hlo.group_size(f"channel_id=1, {groups}, use_global_device_ids=true", 32) == size


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    unknown = []
    module = hlo.parse(re.sub(r"%n = s32\[\] constant\(7\)", "%n = s32[] get-tuple-element(%p), index=1", LOOP))
    steps = [s for s in hlo.walk(module, unknown) if s.instruction.opcode == "collective-permute"]
    assert unknown == ["inner"] and [s.times for s in steps] == [5]
    known = LOOP.replace("body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"11"}}')
    assert totals(known)["collective-permute"][0] == 5 * 11


CHAIN = """HloModule jit_step, num_partitions=16

%gather_start (w: bf16[144,768]) -> bf16[2304,768] {
  %w = bf16[144,768]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g = bf16[2304,768]{1,0} all-gather(%w), channel_id=5, replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={0}
}

%async_collective_fusion.7 (w: bf16[144,768]) -> bf16[2304,768] {
  %w = bf16[144,768]{1,0} parameter(0)
  ROOT %g = bf16[2304,768]{1,0} all-gather(%w), channel_id=5, replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={0}
}

%gather_done (w: bf16[144,768]) -> bf16[2304,768] {
  %w = bf16[144,768]{1,0} parameter(0)
  ROOT %g = bf16[2304,768]{1,0} all-gather(%w), channel_id=5, replica_groups=mesh['axis_0'=16,'axis_1'=1] {'axis_0'}, dimensions={0}
}

ENTRY %main (w: bf16[144,768], g: f32[1024]) -> bf16[2304,768] {
  %w = bf16[144,768]{1,0} parameter(0)
  %g = f32[1024]{0} parameter(1)
  %async-collective-start = bf16[2304,768]{1,0} fusion(%w), kind=kCustom, calls=%gather_start
  %fusion.7 = bf16[2304,768]{1,0} fusion(%w), kind=kCustom, calls=%async_collective_fusion.7
  %token = token[] after-all()
  %send.3 = (f32[1024]{0}, u32[]{:S(2)}, token[]) send(%g, %token), frontend_attributes={name="xla_megascale_runtime"}
  ROOT %async-collective-done = bf16[2304,768]{1,0} fusion(%w), kind=kCustom, calls=%gather_done
}
"""


def test_an_asynchronous_collective_is_one_and_a_send_leaves_the_slice():
    size = 144 * 768 * 2
    assert totals(CHAIN) == {"all-gather": (1, size, 15 * size), "dcn": (1, 4096, 4096)}


TRAFFIC = """HloModule jit_step

%sliced (stack: f32[12,256], at: s32[]) -> f32[256] {
  %stack = f32[12,256]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,256]{1,0} dynamic-slice(%stack, %at, %zero), dynamic_slice_sizes={1,256}
  ROOT %flat = f32[256]{0} bitcast(%slice)
}

%updated (stack: f32[12,256], row: f32[1,256], at: s32[]) -> f32[12,256] {
  %stack = f32[12,256]{1,0} parameter(0)
  %row = f32[1,256]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[12,256]{1,0} dynamic-update-slice(%stack, %row, %at, %zero)
}

ENTRY %main (stack: f32[12,256], row: f32[1,256], at: s32[], near: f32[256]) -> f32[12,256] {
  %stack = f32[12,256]{1,0} parameter(0)
  %row = f32[1,256]{1,0} parameter(1)
  %at = s32[]{:S(6)} parameter(2)
  %near = f32[256]{0:T(256)S(1)} parameter(3)
  %read = f32[256]{0} fusion(%stack, %at), kind=kLoop, calls=%sliced
  %sum = f32[256]{0} add(%read, %near)
  %fetch = (f32[256]{0:S(1)}, f32[256]{0}, u32[]{:S(2)}) copy-start(%sum)
  %fetched = f32[256]{0:S(1)} copy-done(%fetch)
  ROOT %write = f32[12,256]{1,0} fusion(%stack, %row, %at), kind=kLoop, calls=%updated
}
"""


def test_traffic_is_what_is_sliced_and_updated_in_hbm():
    row = 1024  # bytes; read: slice and result; sum: one operand is in vector memory; fetch: one end; write: row and its place
    assert hlo.traffic(hlo.parse(TRAFFIC)) == row * (2 + 2 + 1 + 2)


def test_products_of_unoptimized_text_count_every_iteration():
    def fn(x, w):
        def step(x, w):
            return (jnp.tanh(jnp.matmul(x, w, precision="highest")), None)

        x, _ = jax.lax.scan(step, x, w)
        return jnp.einsum("bd,cd->bc", x.astype(jnp.bfloat16), x.astype(jnp.bfloat16))

    text = jax.jit(fn).lower(jnp.ones((32, 8)), jnp.ones((6, 8, 8))).compiler_ir("hlo").as_hlo_text()
    assert sorted(hlo.products(hlo.parse(text))) == [(2.0 * 32 * 32 * 8, 1), (6 * 2.0 * 32 * 8 * 8, 6)]


def test_a_compiled_program_of_known_collectives():
    """As TPUs' text, CPUs' is of a scan of five; what each chip sends is known from the program alone."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    assert totals(known_program(mesh).compile().as_text()) == KNOWN


def known_program(mesh):
    """Five rounds of every collective over the mesh axes a (2) and b (4); each chip holds x [64, 128] and w [32, 128] float32."""

    def body(x, w):
        def round(carry, _):
            x, w = carry
            full = jax.lax.all_gather(w, "b", tiled=True)
            part = jax.lax.psum_scatter(jnp.sin(full), "b", tiled=True)
            w = jnp.cos(jax.lax.psum(part, "a"))
            x = jax.lax.ppermute(x + w.sum(), "b", [(i, (i + 1) % 4) for i in range(4)])
            return (jax.lax.all_to_all(jnp.cos(x), "b", 0, 0, tiled=True), w), None

        return jax.lax.scan(round, (x, w), None, length=5)[0][0]

    fn = jax.shard_map(body, mesh=mesh, in_specs=(P(("a", "b")), P("b")), out_specs=P(("a", "b")), check_vma=False)

    def place(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))

    return jax.jit(fn).lower(place((512, 128), P(("a", "b"))), place((128, 128), P("b")))


X, W = 64 * 128 * 4, 32 * 128 * 4
KNOWN = {
    "all-gather": (5, 5 * W, 5 * W * 3),
    "reduce-scatter": (5, 5 * 4 * W, 5 * W * 3),
    "all-reduce": (5, 5 * W, 5 * W),
    "collective-permute": (5, 5 * X, 5 * X),
    "all-to-all": (5, 5 * X, 5 * X * 3 / 4),
}


DUMPS = Path(__file__).parent / "data/hlo"


def scanned_products(mesh):
    """Six times x = psum(tanh(x @ w)): each chip of four holds x [8, 128] and w [6, 128, 128] in bfloat16."""

    def body(x, w):
        return jax.lax.scan(lambda x, w: (jax.lax.psum(jnp.tanh(x @ w), "data"), None), x, w)[0]

    fn = jax.shard_map(body, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)

    def place(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))

    return jax.jit(fn).lower(place((32, 128), P("data")), place((6, 128, 128), P()))


def assert_scanned_products(partitioned, optimized, report, assignment):
    """From what the TPU compiler dumps of that program, the numbers that the program itself says."""
    row, unknown = 8 * 128 * 2, []
    final = hlo.parse(optimized)
    assert hlo.products(hlo.parse(partitioned)) == [(6 * 2 * 8 * 128 * 128, 1)]
    assert hlo.collectives(final) == [hlo.Collective("all-reduce", 4, row, 2 * 3 / 4 * row, 6)]
    assert list(hlo.walk(final, unknown)) and not unknown
    memory = hlo.memory(report, assignment)
    assert memory.arguments == row + 6 * 128 * 128 * 2
    assert memory.temporaries > 0 and memory.arguments + memory.temporaries <= memory.total < 2 * memory.arguments


@pytest.mark.parametrize("version", ["jax_0_10", "jax_0_11"])
def test_what_both_compilers_write_is_read(version):
    """One names an element of a tuple on a line of its own, the other as `tuple#1` where it is used, and memory's page too."""
    names = ("partitioned", "optimized", "memory-usage-report", "buffer-assignment")
    texts = [(DUMPS / version / f"{name}.txt").read_text() for name in names]
    assert ("#" in texts[0]) == (version == "jax_0_11")
    assert_scanned_products(*texts)


def test_an_element_of_a_tuple_within_a_tuple():
    text = """HloModule jit_step

ENTRY %main (p: (f32[2], (s32[3,4], f32[]))) -> f32[] {
  %p = (f32[2]{0:T(2,128)}, /*index=1*/(s32[3,4]{1,0}, f32[])) parameter(0)
  %sum = s32[3,4]{1,0} add(%p#1#0, s32[3,4]{1,0} %p#1#0)
  ROOT %negate = f32[] negate(%p#1#1)
}
"""
    scope = hlo.parse(text).computations["main"]
    assert scope["p#1#0"].shapes == (hlo.Shape("s32", (3, 4)),) and scope["p#1#0"].operands == ("p#1",)
    assert scope["p#1#1"].shapes == (hlo.Shape("f32", ()),) and "index=1" in scope["p#1#1"].rest
    assert list(scope) == ["p", "p#1", "p#1#0", "sum", "p#1#1", "negate"]


def test_memory_of_a_report():
    report = "Memory Space: default (color=0)\nTotal bytes: 1000 (1.0KiB)\n\nMemory Space: vmem (color=1)\nTotal bytes: 77 (77B)\n"
    assignment = (
        "BufferAssignment:\nallocation 0: size 512, thread-local:\n"
        "allocation 1: size 300, parameter 11, shape |f32[75]| at ShapeIndex {}, maybe-live-out:\n"
        " value: <1 param.36 @0> (size=300,offset=0): f32[75]{0}\n"
        "allocation 2: size 100, parameter 2, shape |f32[25]| at ShapeIndex {}:\n"
        "allocation 3: size 400, preallocated-temp:\nallocation 4: size 77, color 1, preallocated-temp:\n"
    )
    assert hlo.memory(report, assignment) == hlo.Memory(arguments=400, temporaries=400, total=1000)
    with pytest.raises(ValueError, match="not a memory report"):
        hlo.memory("nothing", assignment)
    with pytest.raises(ValueError, match="no parameter"):  # another spelling must not pass for no memory
        hlo.memory(report, assignment.replace("size", "bytes"))
