"""The count of compiled programs against programs worked by hand; chips, refusals and the JSON of `launch.compile`."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from a2d_jax.settings import RunConfig, default_config
from a2d_jax.sharding import make_mesh
from a2d_jax.throughput import forward_flops
from launch import compile as launch_compile
from launch import hlo
from launch import search as launch_search
from launch.chips import CHIPS, GIB, parse_topology
from launch.compiled import compile_step, used_bytes
from launch.search import Candidate, estimate, meshes, search
from launch.settings import architecture, compress_config, sample_config
from launch.steps import calibrate_step, decompose_step, sample_step, train_step
from launch.tally import count, replica_groups

MESH = {"data": 2, "fsdp": 4, "tensor": 1}


def compiled_text(function, *shapes) -> str:
    return jax.jit(function).lower(*shapes).compile().as_text()


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# -- FLOPs ------------------------------------------------------------------------------------------------------------


def test_a_scanned_matmul_counts_once_a_layer():
    def model(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    tally = count(compiled_text(model, floats(7, 32, 32), floats(5, 32)), {"data": 1})
    assert tally.flops == 7 * 2 * 5 * 32 * 32
    assert tally.num_unknown_loops == 0


def test_nested_scans_multiply_and_the_backward_pass_counts_too():
    def loss(weights, x):
        def outer(x, _):
            return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0], None

        return jnp.sum(jax.lax.scan(outer, x, None, length=3)[0])

    flops = count(compiled_text(jax.grad(loss), floats(4, 16, 16), floats(8, 16)), {"data": 1}).flops
    one = 2 * 8 * 16 * 16
    assert flops in (12 * 3 * one, 12 * 3 * one - one)  # forward, dx, dw; the first layer's dx may be left out


def test_batched_products_count_every_batch():
    attention = lambda q, k: jnp.einsum("btnh,bsnh->bnts", q, k)
    flops = count(compiled_text(attention, floats(2, 6, 3, 8), floats(2, 5, 3, 8)), {"data": 1}).flops
    assert flops == 2 * 2 * 3 * 6 * 5 * 8


def test_a_loop_that_depends_on_data_counts_once_and_is_reported():
    def halve(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: (x @ w) / 2, x)

    tally = count(compiled_text(halve, floats(4, 4), floats(4, 4)), {"data": 1})
    assert (tally.flops, tally.num_unknown_loops) == (2 * 4 * 4 * 4, 1)


def test_of_branches_the_dearest_counts():
    def either(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x, x)

    text = compiled_text(either, jax.ShapeDtypeStruct((), bool), floats(16, 16))
    assert count(text, {"data": 1}).flops == 2 * 2 * 16**3


BATCHED_AS_CONVOLUTION = """HloModule m

ENTRY %main (a: f32[3,5,8], b: f32[3,7,8]) -> f32[3,5,7] {
  %a = f32[3,5,8]{2,1,0} parameter(0)
  %b = f32[3,7,8]{2,1,0} parameter(1)
  ROOT %conv = f32[3,5,7]{2,1,0} convolution(%a, %b), WINDOW, dim_labels=0bf_0oi->0bf
}
""".replace("WINDOW", "window={size=3 stride=2 pad=0_0 lhs_dilate=3}")


def test_positions_that_fall_on_padding_are_no_work():
    # The TPU compiler's way to write a batched product: of the 3 x 3 pairs (i, k) the window reads position 2 i + k of
    # a row that is dilated by 3, where only multiples of 3 hold data: (0, 0), (1, 1), (2, 2) remain.
    assert count(BATCHED_AS_CONVOLUTION, {"data": 1}).flops == 2 * 3 * 5 * 7 * 8


COUNTED_LOOP = """HloModule m, is_scheduled=true

%body (p: (s32[], f32[8,8], s32[])) -> (s32[], f32[8,8], s32[]) {
  %p = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[8,8]{1,0:T(8,128)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}, PRECISION
  ROOT %t = (s32[], f32[8,8]{1,0:T(8,128)}, s32[]) tuple(%next, %y, %n)
}

%condition (p: (s32[], f32[8,8], s32[])) -> pred[] {
  %p = (s32[], f32[8,8]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=2
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0:T(8,128)} parameter(0)
  %zero = s32[] constant(3)
  %copied = s32[] copy(%zero)
  %stop = s32[] constant(14)
  %start = (s32[], f32[8,8]{1,0}, s32[]) tuple(%copied, %x, %stop)
  %loop = (s32[], f32[8,8]{1,0}, s32[]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8,8]{1,0} get-tuple-element(%loop), index=1
}
""".replace("PRECISION", "operand_precision={highest,highest}")


def test_the_trips_of_a_loop_follow_from_its_start_and_condition():
    tally = count(COUNTED_LOOP, {"data": 1})
    assert tally.flops == 11 * 2 * 8**3
    assert tally.mxu_flops == 6 * tally.flops  # a float32 product takes six passes of bfloat16


def test_an_unrolled_loop_runs_less_often():
    text = COUNTED_LOOP.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")
    assert count(text, {"data": 1}).flops == 6 * 2 * 8**3  # 3, 5, ..., 13


KERNEL = """HloModule m

ENTRY %main (q: bf16[4,128,64], k: bf16[2,256,64]) -> bf16[4,128,64] {
  %q = bf16[4,128,64]{2,1,0} parameter(0)
  %k = bf16[2,256,64]{2,1,0} parameter(1)
  %splash_mha_fwd.2 = bf16[4,128,64]{2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu", notes={kernel={
"block_q":"128"
}}, metadata={op_name="attention"}
  %other = bf16[4,128,64]{2,1,0} custom-call(%q), backend_config={"cost_estimate":{"flops":"1000","bytes_accessed":"1"}}
  ROOT %t = bf16[4,128,64]{2,1,0} add(%splash_mha_fwd.2, %other)
}
"""


def test_kernels_count_although_their_notes_run_over_lines():
    assert count(KERNEL, {"data": 1}).flops == 2 * 2 * 4 * 128 * 256 * 64 + 1000


# -- collectives ------------------------------------------------------------------------------------------------------


def collectives_of(function, in_spec, out_spec, *shapes):
    mesh = make_mesh(2, 4, 1)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False)
    placed = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, in_spec)) for s in shapes]
    return count(compiled_text(mapped, *placed), MESH).collectives


@pytest.mark.parametrize(
    ("function", "out_spec", "kind", "axes", "sent"),
    [
        # Each chip holds (4, 6) of (8, 24) float32: 96 bytes.
        (lambda x: jax.lax.all_gather(x, "fsdp"), ("data",), "all-gather", "fsdp", 4 * 96 * 3 / 4),
        (lambda x: jax.lax.psum(x, "data"), (None, "fsdp"), "all-reduce", "data", 2 * 96 / 2),
        (lambda x: jax.lax.psum(x, ("data", "fsdp")), (), "all-reduce", "data+fsdp", 2 * 96 * 7 / 8),
        (lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), ("data", "fsdp"),
         "collective-permute", "fsdp", 96),
        (lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0), ("data", "fsdp"), "all-to-all", "fsdp", 96 * 3 / 4),
    ],
)  # fmt: skip
def test_bytes_and_axes_of_each_collective(function, out_spec, kind, axes, sent):
    found = collectives_of(function, PartitionSpec("data", "fsdp"), PartitionSpec(*out_spec), floats(8, 24))
    assert [(c.kind, c.axes, c.num_bytes) for c in found] == [(kind, axes, sent)]


def test_a_collective_in_a_loop_counts_every_trip():
    def body(x):
        return jax.lax.scan(lambda x, _: (jax.lax.psum(x * 2, "fsdp") / 4, None), x, None, length=5)[0]

    (found,) = collectives_of(body, PartitionSpec("data", "fsdp"), PartitionSpec("data", "fsdp"), floats(8, 24))
    assert (found.num_runs, found.num_bytes) == (5, 5 * 2 * 96 * 3 / 4)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
    ],
)
def test_every_notation_of_groups(text, groups):
    instruction = hlo.Instruction("r", "all-reduce", (), (), "", text, False)
    assert replica_groups(instruction, 4) == groups


ASYNCHRONOUS = """HloModule m, is_scheduled=true

%carry (a: f32[4,8], w: f32[8,8]) -> f32[16,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} parameter(1)
  ROOT %g = f32[16,8]{1,0} all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}

%async_collective_fusion.1 (a: f32[4,8], w: f32[8,8]) -> f32[16,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} parameter(1)
  %y = f32[4,8]{1,0} dot(%a, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %g = f32[16,8]{1,0} all-gather(%a), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}

ENTRY %main (a: f32[4,8], w: f32[8,8]) -> f32[16,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} parameter(1)
  %s = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%a), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %y = f32[4,8]{1,0} dot(%a, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %d = f32[16,8]{1,0} all-gather-done(%s)
  %s2 = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%y), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
  %d2 = f32[16,8]{1,0} all-gather-done(%s2)
  %async-collective-start = f32[16,8]{1,0} fusion(%a, %w), kind=kCustom, calls=%carry
  ROOT %f = f32[16,8]{1,0} fusion(%a, %w), kind=kCustom, calls=%async_collective_fusion.1
}
"""


def test_which_transfers_run_beside_other_work():
    found = count(ASYNCHRONOUS, {"fsdp": 4}).collectives
    # The pair around the product, the pair around nothing, and the transfer that a product carries in steps: once.
    assert [(c.is_async, c.num_bytes) for c in found] == [(True, 384), (False, 384), (True, 384)]


def test_reading_one_layer_of_a_stack_is_not_reading_the_stack():
    def model(weights, x):
        return jax.lax.scan(lambda x, w: (x * w, None), x, weights)[0]

    tally = count(compiled_text(model, floats(50, 1000), floats(1000)), {"data": 1})
    assert 50 * 1000 * 4 < tally.memory_bytes < 10 * 50 * 1000 * 4


# -- chips and models -------------------------------------------------------------------------------------------------


def test_a_slice_has_its_chips_and_links():
    v5e, v5p = parse_topology("v5e:4x4"), parse_topology("v5p:4x4x4")
    assert (v5e.num_chips, v5p.num_chips) == (16, 64)
    assert v5e.ici_bandwidth == 2 * 50e9  # a corner of a sheet has two neighbours
    assert v5p.ici_bandwidth == 6 * 100e9  # a cube of 4 is closed to rings
    assert parse_topology("v5e:16x16").ici_bandwidth == 4 * 50e9
    for name, chip in CHIPS.items():
        assert 15 * GIB < chip.hbm_bytes < 100 * GIB
        for shape in chip.slices:
            assert parse_topology(f"{name}:{shape}").num_chips == math.prod(map(int, shape.split("x"))) <= 1024


@pytest.mark.parametrize("name", ["v5e:3x5", "v9:2x2", "v5e", "v5p:4x4", ""])
def test_an_unknown_slice_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"(?s)Known shapes.*v5e: .*4x4.*v6e"):
        parse_topology(name)


@pytest.mark.parametrize(
    ("name", "num_billions"),
    [("LLaDA-8B-Instruct", 8.02), ("Dream-v0-Instruct-7B", 7.62), ("Llama-2-7b-hf", 6.74), ("Llama-2-70b-hf", 68.98)],
)
def test_carried_architectures_have_the_published_size(name, num_billions):
    config = architecture(f"anywhere/{name}")
    weights, _ = forward_flops(config, num_tokens=1, length=1)
    num_params = weights / 2 + config.vocab_size * config.width  # and the embedding, which multiplies nothing
    assert num_params / 1e9 == pytest.approx(num_billions, abs=0.01)


def test_an_unknown_checkpoint_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="LLaDA-8B-Instruct"):
        architecture("nowhere/GPT-2")


def test_search_tries_every_mesh_of_the_chips():
    found = list(meshes(16, num_heads=32, num_kv_heads=4))
    assert (1, 16, 1) in found and (2, 2, 4) in found and (16, 1, 1) in found
    assert all(math.prod(sizes) == 16 for sizes in found)
    assert max(tensor for *_, tensor in found) == 4  # more would cut a key/value head
    assert len(found) == len(set(found)) == 5 + 4 + 3


# -- the program ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(fixtures):
    config = default_config()
    config.model.checkpoint = str(fixtures / "llada_tiny")
    config.data.files, config.data.row_length, config.data.buckets = ("rows.jsonl",), 16, (16,)
    config.num_steps, config.remat = 1, "full"
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config


def changed(config, **fields) -> dict:
    for path, value in fields.items():
        functools.reduce(getattr, path.split("__")[:-1], config)[path.split("__")[-1]] = value
    return config.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mesh__fsdp": 3}, "does not use the 8 devices"),
        ({"mesh__tensor": 8}, "tensor=8 does not divide the 4 heads"),
        ({"batch_size": 12}, "batch_size=12 does not split"),
        ({"batch_size": 16, "grad_accum_steps": 4}, "use a multiple of 32"),
    ],
)
def test_what_does_not_fit_the_mesh_is_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        train_step(changed(config, **fields), jax.devices())


def test_sampling_refuses_a_batch_that_does_not_split(fixtures):
    config = sample_config(str(fixtures / "llada_tiny"), batch_size=6, prompt_length=8, gen_length=8, steps=8)
    with pytest.raises(ValueError, match="batch_size=6 does not split over data=8"):
        sample_step(config.to_dict(), jax.devices())


@pytest.mark.parametrize(
    ("build", "lacks"),
    [(sample_step, "prompt_length, sampler"), (calibrate_step, "calibrate"), (decompose_step, "decompose")],
)
def test_a_step_that_the_config_does_not_describe_is_refused(config, build, lacks):
    with pytest.raises(ValueError, match=f"describes no .* step: it lacks {lacks}; give .* another --step"):
        build(changed(config), jax.devices())


def test_a_matrix_that_cannot_be_decomposed_is_refused_before_it_is_compiled(fixtures):
    config = compress_config(str(fixtures / "llada_tiny"), batch_size=8, length=16, rank=8).to_dict()
    with pytest.raises(ValueError, match=r"--shape \(64, 100\): its 100 columns are not a multiple of 8"):
        decompose_step(config, jax.devices(), shape=(64, 100))


def test_a_config_is_named_after_its_file_not_after_its_argument():
    assert launch_compile.name_of("configs/world_a2d.py:DIR/world") == "world_a2d"
    assert launch_compile.name_of("configs/llada_8b_a2d.py") == "llada_8b_a2d"


SCHEMA = {
    "topology": str, "num_chips": int, "mesh": dict, "fits": bool, "argument_bytes": int, "temp_bytes": int,
    "hbm_bytes": int, "hlo_flops": float, "model_flops": float, "collective_bytes": dict, "roofline_seconds": float,
    "roofline_mfu": float, "compile_seconds": float,
}  # fmt: skip


def test_no_share_of_the_peak_is_given_where_the_passes_of_a_reference_are_not_counted(config):
    residual = {"weight": 0.3, "target": "base", "text": None}
    assert train_step(changed(config), jax.devices()).model_flops > 0
    assert train_step(changed(config, residual=residual), jax.devices()).model_flops is None


def test_a_compiled_training_step_is_described(config, tmp_path):
    step = train_step(changed(config), jax.devices())
    topology = parse_topology("v5e:2x4")
    result = json.loads(json.dumps(compile_step(step, topology, tmp_path / "new" / "step.hlo")))
    assert (tmp_path / "new" / "step.hlo").read_text().startswith("HloModule")
    assert {name: type(result[name]) for name in SCHEMA} == SCHEMA
    assert result["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1} and result["fits"]
    assert 1.0 < result["flops_ratio"] < 1.34
    # Weights and two moments of 4 bytes each, an eighth on each chip; norm scales are whole, the batch is small.
    model = architecture(config.model.checkpoint)
    num_params = forward_flops(model, 1, 1)[0] / 2 + model.vocab_size * model.width
    assert result["argument_bytes"] == pytest.approx(12 * num_params / 8, rel=0.1)
    assert any(name.startswith("fsdp/") for name in result["collective_bytes"])
    text = launch_compile.describe(step.title, result, topology.chip.peak_flops)
    assert "FITS" in text and "every weight" in text


def test_search_compiles_the_promising_and_ranks_them(config):
    lines = []
    result = search(changed(config), parse_topology("v5e:2x4"), jax.devices(), 2, "tiny", lines.append)
    assert len(result["candidates"]) == 2 and len(lines) == 3
    times = [candidate["roofline_seconds"] for candidate in result["candidates"]]
    assert times == sorted(times) and result["roofline_seconds"] == times[0] and result["config"] == "tiny"


def test_a_search_continues_where_it_stopped_and_ends_where_nothing_can_be_faster(config, monkeypatch):
    topology, calls, kept = parse_topology("v5e:2x4"), [], []

    def compile_step(step, topology, effort):
        calls.append(effort)
        return {"fits": True, "roofline_seconds": seconds, "roofline_mfu": 0.5, "needed_bytes": 1, "compile_seconds": 1}

    def run_search(effort=0.0, **given):
        calls.clear()
        return search(changed(config), topology, jax.devices(), 4, "tiny", lambda _: None, effort, **given)

    monkeypatch.setattr(launch_search, "compile_step", compile_step)
    seconds = 1e9  # slower than any estimate
    result = run_search(keep=kept.append)
    assert len(calls) == 4 and [len(state["candidates"]) for state in kept] == [1, 2, 3, 4]
    stopped = json.loads(json.dumps(kept[1]))
    assert run_search(earlier=stopped)["candidates"] == result["candidates"] and len(calls) == 2
    run_search(-1.0, earlier=stopped)
    assert calls == [-1.0] * 4  # another compiler, other numbers
    seconds = 0.0  # faster than any estimate
    assert len(run_search()["candidates"]) == len(calls) == 1


def test_search_estimates_what_the_weights_alone_take(config):
    config.model.checkpoint = "checkpoints/LLaDA-8B-Instruct"
    run, model = RunConfig.from_dict(config), architecture("LLaDA-8B-Instruct")
    by_hand = functools.partial(estimate, run=run, model=model, topology=parse_topology("v5e:4x4"))
    whole, split = by_hand(Candidate(16, 1, 1, "full", 1)), by_hand(Candidate(1, 16, 1, "full", 1))
    assert whole.memory_bytes > 16 * 8.0e9  # weights, two moments and gradients, 4 bytes each
    assert split.memory_bytes == pytest.approx(whole.memory_bytes / 16, rel=0.02)
    heads = by_hand(Candidate(1, 1, 16, "full", 1))
    assert heads.seconds < split.seconds / 5  # one row a chip: moving activations is cheaper than moving weights


def test_a_refusal_of_the_compiler_names_the_memory_it_needs():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm."
    assert used_bytes(message) == 21.5 * 2**30
    message = "the total memory required for HLO temporaries (19G) exceeds available HBM (15.75G)."
    assert used_bytes(message) == 19 * 2**30
    assert used_bytes("INVALID_ARGUMENT") is None


def test_what_is_too_large_does_not_fit():
    class Lowered:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: ... Used 21.50G of 15.75G hbm. ...")

    step = train_step.__globals__["Step"]("a step", make_mesh(1, 8, 1), Lowered, 1e12)
    result = compile_step(step, parse_topology("v5e:2x4"))
    assert not result["fits"] and result["needed_bytes"] > result["hbm_bytes"]
    assert set(SCHEMA) <= set(result)
    assert "DOES NOT FIT" in launch_compile.describe(step.title, result, 1e12)
    assert np.isfinite(result["compile_seconds"])
