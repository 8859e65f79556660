"""What only the TPU compiler can say; skipped where libtpu is not installed (`make env-tpu`)."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from a2d_jax.settings import default_config
from a2d_jax.sharding import make_mesh
from launch import hlo
from launch.chips import GIB, parse_topology, topology_devices
from launch.compiled import compile_step
from launch.settings import compress_config, sample_config
from launch.steps import decompose_step, sample_step, train_step
from launch.tally import count
from odlri_jax.codebooks import E8P12, E8P12RVQ3B, E8P12RVQ4B
from odlri_jax.kernel import packed_product

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed: make env-tpu"
)

MODEL = {
    "model_type": "llada", "activation_type": "silu", "block_type": "llama", "d_model": 256, "n_heads": 2,
    "n_kv_heads": 2, "n_layers": 3, "mlp_hidden_size": 512, "vocab_size": 2048, "embedding_size": 2048,
    "eos_token_id": 2000, "mask_token_id": 2001, "pad_token_id": 2000, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
    "weight_tying": False, "layer_norm_type": "rms",
}  # fmt: skip
NUM_PARAMS = 2 * 2048 * 256 + 3 * (4 * 256 * 256 + 3 * 256 * 512)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODEL))
    return str(folder)


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:1x1", "v5e:4x4", "v5p:2x2x4", "v6e:2x4"])
def test_a_slice_has_one_device_for_each_chip(name):
    topology = parse_topology(name)
    devices = topology_devices(topology)
    assert len(devices) == topology.num_chips
    assert all(device.platform == "tpu" for device in devices)


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """A compiled training step on four chips: (result, program)."""
    config = default_config()
    config.model.checkpoint, config.num_steps, config.remat, config.batch_size = checkpoint, 1, "full", 8
    config.data.files, config.data.row_length, config.data.buckets = ("rows.jsonl",), 128, (128,)
    config.dtypes.compute = "bfloat16"
    config.mesh.data, config.mesh.fsdp = 1, -1
    topology = parse_topology("v5e:2x2")
    path = tmp_path_factory.mktemp("out") / "step.hlo"
    return compile_step(train_step(config.to_dict(), topology_devices(topology)), topology, path), path.read_text()


def test_a_training_step_compiles_for_a_tpu(trained):
    result, _ = trained
    assert result["fits"] and result["num_chips"] == 4
    assert result["argument_bytes"] == pytest.approx(12 * NUM_PARAMS / 4, rel=0.2)  # arrays are padded to tiles
    assert 1.0 < result["flops_ratio"] < 1.34
    assert result["roofline_seconds"] == max(result["roofline"].values())
    assert 0 < result["roofline_mfu"] < 1


def test_attention_is_the_kernel_forward_and_backward(trained):
    _, text = trained
    names = {i.name for c in hlo.parse(text).computations.values() for i in c.instructions.values()}
    assert any(name.startswith("splash_mha_fwd") for name in names)
    assert any(name.startswith("splash_mha_dkv") for name in names)


def test_decoding_compiles_for_a_tpu(checkpoint):
    topology = parse_topology("v5e:2x2")
    config = sample_config(checkpoint, batch_size=4, prompt_length=64, gen_length=64, steps=64, block_length=32)
    config.mesh.data, config.mesh.tensor = 2, 2
    result = compile_step(sample_step(config.to_dict(), topology_devices(topology)), topology)
    assert result["fits"] and result["num_unknown_loops"] == 1  # the loop over passes ends when nothing is masked
    assert result["argument_bytes"] == pytest.approx(2 * NUM_PARAMS / 2, rel=0.2)


def test_a_model_that_is_too_large_does_not_fit(tmp_path):
    large = MODEL | {"d_model": 8192, "n_heads": 64, "n_kv_heads": 64, "mlp_hidden_size": 32768, "n_layers": 16}
    (tmp_path / "config.json").write_text(json.dumps(large))
    config = sample_config(str(tmp_path), batch_size=1, prompt_length=64, gen_length=64, steps=64)
    topology = parse_topology("v5e:1x1")
    result = compile_step(sample_step(config.to_dict(), topology_devices(topology)), topology)
    assert not result["fits"] and result["needed_bytes"] > 16 * GIB
    assert jax.devices()[0].platform == "cpu"  # and nothing ran anywhere


def test_a_decomposition_has_no_loop_that_depends_on_data():
    settings = {"rank": 16, "outer_iters": 2, "inner_iters": 2, "tune_iters": 1, "init": "odlri", "num_outliers": 4}
    config = compress_config("checkpoints/Llama-2-7b-hf", batch_size=4, length=128, **settings)
    topology = parse_topology("v5e:2x2")
    step = decompose_step(config.to_dict(), topology_devices(topology), shape=(128, 256))
    result = compile_step(step, topology, effort=-1.0)
    assert result["fits"] and result["num_unknown_loops"] == 0
    # Two alternations, each a pass of feedback and a sweep, two errors and A S_H: at least 5 products (m, n) x (n, n).
    assert result["hlo_flops"] > 2 * 5 * 2 * 128 * 256 * 256


@pytest.mark.parametrize("codebook", [E8P12, E8P12RVQ3B, E8P12RVQ4B], ids=lambda c: c.name)
@pytest.mark.parametrize("name", ["v5e:1x1", "v5p:2x2x1"])
def test_the_kernel_of_packed_layers_compiles(name, codebook):
    num_tokens, m, n, rank = 16, 300, 1376, 32
    topology = parse_topology(name)
    mesh = make_mesh(topology.num_chips, devices=topology_devices(topology))

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    arrays = {"q_index": shape(m, n // 8, dtype=jnp.uint16), "q_scale": shape(dtype=jnp.float32)}
    if codebook.residual:
        arrays["q_residual"] = shape(m, n // 8, dtype=jnp.uint16 if codebook.residual == "e8p" else jnp.uint8)

    def product(x, arrays, factors):
        return packed_product(x, arrays, codebook, factors)

    everywhere = PartitionSpec()
    split = jax.shard_map(product, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    with jax.set_mesh(mesh):
        lowered = jax.jit(split).lower(shape(num_tokens, n), arrays, (shape(num_tokens, rank), shape(m, rank)))
    text = lowered.compile().as_text()
    assert "packed_product" in text and "gather" not in text  # no table of points in main memory
    assert count(text, dict(mesh.shape)).flops == 2 * num_tokens * m * (n + rank)
