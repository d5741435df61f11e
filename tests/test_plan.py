"""The plan of a run: errors before any work, the largest batch, and, with the TPU compiler, that every step compiles."""

import importlib.util
import json
import math
import os
import re

import jax
import numpy as np
import pytest
from command_line import error_of
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh
from test_experiments import ARGUMENTS, FILES, ROOT, load
from test_hlo import DUMPS, KNOWN, assert_scanned_products, known_program, scanned_products, totals
from toy import run_config

from flowlm.engine.build import abstract_state, build
from flowlm.engine.sharding import Layout, make_mesh
from flowlm.scale import ahead_of_time, plan
from flowlm.scale.ahead_of_time import needed_memory, parse_topology, trace_step
from flowlm.scale.costs import CHIPS, EFFICIENCY, forward_flops
from flowlm.scale.plan import RESOLUTION, device_need, largest_batch, plan_device

# ---- Without the TPU compiler -----------------------------------------------------------------------------------


def test_bad_input_is_named(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = "--config=experiments/test.py"
    assert re.search(r"'v5e:3x3'.*v5e: 2x2, .*16x16; v5p", error_of("plan", config, "--topology=v5e:3x3"))
    assert "CHIP:SHAPE:SLICES" in error_of("plan", config, "--topology=v5e:4x4,v9:2x2")
    assert "either --topology" in error_of("plan", config)
    assert "either --topology" in error_of("plan", config, "--topology=v5e:4x4", "--device")
    assert "model.heads 3" in error_of("plan", config, "--topology=v5e:4x4", "--config.model.heads=3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install -e .[tpu-plan]" in error_of("plan", config, "--topology=v5e:4x4")


def test_topologies():
    assert parse_topology("v5e:4x4:2")[2:] == ("4x4", 2)
    chips = [math.prod(map(int, shape.split("x"))) for chip in CHIPS.values() for shape in chip.shapes]
    assert min(chips) == 4 and 1024 in chips
    for wrong in ("v5e", "v5e:4x4:0", "v5e:4x4:x", "4x4"):
        with pytest.raises(ValueError, match="unknown --topology"):
            parse_topology(wrong)


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("most", [0, 3, 30, 257, 3000])
@pytest.mark.parametrize("law", ["line", "plateau", "silent"])
def test_the_largest_batch(unit, most, law):
    """Needs are never asked twice nor often, and the answer is within its resolution of the truth."""
    limit, asked = 1000.0, []
    slope = 900 / (most + 0.5)

    def need(rows):
        asked.append(rows)
        assert rows % unit == 0
        units = rows // unit
        if units > most:
            return math.inf if law == "silent" else 100 + slope * units
        return limit if law == "plateau" and units > 0.8 * most else 100 + slope * units  # XLA spends what it has

    known = 8 * unit
    found = largest_batch(need, unit, limit, {known: need(known)})
    assert found % unit == 0 and found // unit <= most
    assert most - found // unit <= max(1, RESOLUTION * most) and (found > 0 or most <= 1)
    assert len(asked) == len(set(asked)) <= 20


def test_what_a_compiler_says_it_lacks():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (292.50G) exceeds"
    )
    assert needed_memory(f"{message} available HBM (15.75G).") == 292.5 * 2**30
    assert needed_memory("INTERNAL: Mosaic failed to compile") is None


@pytest.mark.parametrize("last", ["optimized", "memory-usage-report"])
def test_dumps_are_read_once_all_are_whole(tmp_path, last):
    """Compilers write them in different orders, and one that is being written has only its beginning."""
    names = {"optimized": "after_optimizations", "memory-usage-report": "after_optimizations-memory-usage-report"}
    (tmp_path / "dump").mkdir()

    def write(name, share=1.0):
        text = (DUMPS / "jax_0_11" / f"{name}.txt").read_text()
        path = tmp_path / "dump" / f"module_0000.jit_step.{names[name]}.txt"
        path.write_text(text[: int(share * len(text))])
        os.utime(path, (0, 0))
        return ahead_of_time._dumped(tmp_path)

    assert not write(next(name for name in names if name != last))
    assert not write(last, 0.0) and not write(last, 0.7)
    assert write(last)


def test_the_search_for_the_largest_batch_ends():
    assert largest_batch(lambda rows: 1.0, 4, 2.0, {8: 1.0}) == plan.MOST


def test_the_largest_batch_of_the_device_at_hand(tmp_path, monkeypatch, capsys):
    """What fits is compiled and needs no more than the limit; a little more would need more."""
    config, needs = run_config(tmp_path), {}
    config.model.blocks = 1

    def remember(config, rows):
        return needs.setdefault(rows, device_need(config, rows))

    monkeypatch.setattr(plan, "device_need", remember)
    limit = 1.5 * remember(config, 16)
    found = plan_device(config, limit)
    assert f"{found:,} sequences of 19 tokens" in capsys.readouterr().out
    assert found > 16 and needs[found] <= limit
    assert min(rows for rows, bytes in needs.items() if bytes > limit) <= found * (1 + RESOLUTION) + 1


# ---- With it -----------------------------------------------------------------------------------------------------

tpu = pytest.mark.needs("tpu-plan")


@pytest.fixture
def four_chips(monkeypatch):
    for name, value in ahead_of_time.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return parse_topology("v5e:2x2").devices()


def reduced(config):
    """Two blocks of width 64, few tokens: the same program at a size that compiles in seconds."""
    config.batch_size = 16
    config.accumulation = 1
    config.data.length = min(config.data.length, 128 if config.model.attention == "splash" else 32)
    config.model.update(width=64, blocks=2, heads=2, cond=32, vocab_size=min(config.model.vocab_size, 512))
    if "start" in config.objective:
        config.objective.start = min(config.objective.start, 500)
    if config.objective.family == "gumbel":
        config.model.width = 128  # because a state of fewer numbers than tokens does not show the noise of each
    return config


STUDENTS = ("flow_map", "matched", "matched_masked", "matched_uniform", "gumbel", "residual", "sdtt", "dcd")
EXPERIMENTS = [(path, "") for path in FILES] + [
    (path, argument) for path in FILES if path.stem == "grammar" for argument in ARGUMENTS["grammar"]
]


@tpu
@pytest.mark.parametrize(("path", "argument"), EXPERIMENTS, ids=lambda value: getattr(value, "stem", value))
def test_every_experiment_compiles_for_tpus(path, argument, four_chips):
    config = reduced(load(path).get_config(argument))
    config.teacher = "its run directory" if argument in STUDENTS else None
    assert_compiles(config, four_chips)


@tpu
@pytest.mark.parametrize(
    "target", ["psd", "psd_squared", "teacher_steps", "residual", "lsd", "lsd_logit", "ecld", "esd", "esd_logit"]
)
def test_every_target_compiles_for_tpus(target, four_chips):
    config = reduced(load(ROOT / "experiments/grammar.py").get_config("flow_map"))
    config.objective.update(target=target, tau_max=0.99)
    config.teacher = "its run directory"
    assert_compiles(config, four_chips)


def assert_compiles(config, devices):
    traced = trace_step(config, devices).traced
    compiled = traced.lower().compile()
    assert compiled.memory_analysis().argument_size_in_bytes > 0


@tpu
def test_known_collectives_of_a_tpu_program(monkeypatch):
    """The program whose collectives are counted by hand, after all passes of the TPU compiler."""
    for name, value in ahead_of_time.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    devices = parse_topology("v5e:2x4").devices()
    mesh = Mesh(np.array(devices).reshape(2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    counted = totals(known_program(mesh).compile().as_text())
    for kind, (number, _, wire) in KNOWN.items():
        assert counted[kind][0] == number
        assert wire / 2 <= counted[kind][2] <= wire, kind  # what is multiplied in bfloat16 may be sent so


@pytest.fixture
def no_cache():
    """What is found in the cache of compiled programs is not compiled, hence not dumped."""
    for enabled in (False, True):
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
        if not enabled:
            yield


@tpu
def test_what_this_compiler_writes_is_read(four_chips, no_cache, tmp_path):
    mesh = Mesh(np.array(four_chips), ("data",), axis_types=(AxisType.Auto,))
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "tpu-spmd-partitioning"}
    scanned_products(mesh).compile(compiler_options=options)
    names = ("tpu-spmd-partitioning*", "optimizations", "optimizations-memory-usage-report")
    texts = [next(tmp_path.glob(f"*after_{name}.txt")).read_text() for name in names]
    assert_scanned_products(*texts, next(tmp_path.glob("*after_optimizations-buffer-assignment.txt")).read_text())


@tpu
def test_a_plan_of_a_small_run(tmp_path, capsys):
    """What it says of memory and wires is what 16 bytes of state and one float32 gradient a parameter make of them."""
    config = run_config(tmp_path)
    config.update(batch_size=32)
    config.mesh.data = -1
    config.model.update(width=256, heads=4)
    plan.plan(config, ["v5e:2x2"], str(tmp_path / "plan"), None, largest=False)
    assert "an estimate" in capsys.readouterr().out
    report = json.loads((tmp_path / "plan/plan.json").read_text())
    (point,) = report["points"]
    train, estimate = point["train"], point["estimate"]
    state = abstract_state(build(config, 99), Layout(make_mesh(data=1)))
    parameters = sum(a.size for a in jax.tree.leaves(state.params))

    assert (train["chips"], train["per_chip"], train["fits"]) == (4, 8, True)
    assert 16 * parameters < train["hbm"]["arguments"] < 1.2 * 16 * parameters  # arrays are padded to tiles
    held = train["hbm"]["arguments"] + train["hbm"]["temporaries"]
    assert held <= train["hbm"]["total"] < 1.1 * held
    assert 0.9 * 6 * parameters < train["wire"] < 1.2 * 6 * parameters and train["dcn"] == 0  # 2 (n-1)/n of 4 bytes
    assert train["loops_of_unknown_length"] == []
    # The products that were written down are those that the compiler has, on each chip's own rows.
    assert 4 * train["flops_per_chip"] == pytest.approx(train["flops"], rel=0.01)
    fields = dict(width=256, blocks=2, cond=32, time_embeddings=1, vocab=99, length=19)
    assert estimate["network_flops_per_token"] == 3 * forward_flops(**fields) < estimate["flops_per_token"]
    seconds = max(train["passes_per_chip"] / 197e12, train["traffic"] / 819e9, train["wire"] / 200e9) / EFFICIENCY
    assert estimate["tokens_per_second_per_chip"] == pytest.approx(8 * 19 / seconds)
    assert point["sample"]["hbm"]["arguments"] < train["hbm"]["arguments"] / 2  # parameters alone
    assert "| sequences per chip | 8 |\n" in (tmp_path / "plan/plan.md").read_text()
    assert (tmp_path / "plan/plan.png").stat().st_size > 1000

    with pytest.raises(ValueError, match="v5e:2x2: batch_size 28 is not a multiple of accumulation 8"):
        config.update(accumulation=8)
        plan.plan(config, ["v5e:2x2"], None, 7, largest=False)
