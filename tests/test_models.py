"""The transformer against the original models' outputs, and against transformers + PyTorch for the causal families."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from a2d_jax.config import ModelConfig, load_config
from a2d_jax.hf_io import abstract_model, save_pretrained
from a2d_jax.models.lora import LoRAConfig, attach
from a2d_jax.models.transformer import DTypes, Linear, Transformer
from a2d_jax.pretrained import load_pretrained
from a2d_jax.sharding import RULES, logical_axes

FIXTURES = Path(__file__).parent / "fixtures"

ATOL = 1e-4  # float32 and float64 logits of these models differ by 2e-5 already


@pytest.mark.parametrize("folder", ["llada_tiny", "llada_tiny_sharded", "dream_tiny"])
def test_logits_match_the_original_model(folder):
    recorded = np.load(FIXTURES / folder.removesuffix("_sharded") / "forward.npz")
    model = load_pretrained(FIXTURES / folder)
    logits = model(recorded["input_ids"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, recorded["logits"], atol=ATOL)
    np.testing.assert_allclose(model.hidden_states(recorded["input_ids"]), recorded["final_norm_out"], atol=ATOL)


@pytest.mark.parametrize("folder", ["llada_tiny", "dream_tiny"])
def test_padded_logits_match_the_original_model(folder):
    recorded = np.load(FIXTURES / folder / "forward.npz")
    is_real = recorded["pad_attention_mask"].astype(bool)
    logits = load_pretrained(FIXTURES / folder)(recorded["pad_input_ids"], attention_mask=is_real)
    np.testing.assert_allclose(np.asarray(logits)[is_real], recorded["pad_logits"][is_real], atol=ATOL)


def test_padding_on_either_side_changes_nothing():
    model = load_pretrained(FIXTURES / "llada_tiny")
    tokens = np.arange(1, 13)[None]
    alone = np.asarray(model(tokens))
    left = np.concatenate([np.full((1, 4), 250), tokens], axis=1)
    right = np.concatenate([tokens, np.full((1, 4), 250)], axis=1)
    is_real = np.arange(16)[None] >= 4
    np.testing.assert_allclose(np.asarray(model(left, attention_mask=is_real))[:, 4:], alone, atol=ATOL)
    np.testing.assert_allclose(np.asarray(model(right, attention_mask=is_real[:, ::-1]))[:, :12], alone, atol=ATOL)


def test_tokens_and_mask_may_be_lists_but_must_be_rows():
    model = load_pretrained(FIXTURES / "llada_tiny")
    tokens, is_real = np.arange(1, 17)[None], np.arange(16)[None] >= 4
    expected = model(tokens, attention_mask=is_real)
    np.testing.assert_array_equal(model(tokens.tolist(), attention_mask=is_real.tolist()), expected)
    for given in (tokens[0], tokens[0].tolist(), tokens.astype(np.float32)):
        with pytest.raises(ValueError, match=r"tokens have shape .* and dtype .*; give \(B, T\) token ids"):
            model(given)


def test_bfloat16_stays_within_the_originals_own_rounding():
    recorded = np.load(FIXTURES / "llada_tiny" / "forward_bf16.npz")
    exact = np.load(FIXTURES / "llada_tiny" / "forward.npz")["logits"]
    logits = load_pretrained(FIXTURES / "llada_tiny", dtype=jnp.bfloat16)(recorded["input_ids"])
    theirs = np.abs(recorded["logits_bf16_as_f32"] - exact).mean()
    assert np.abs(np.asarray(logits) - exact).mean() < 1.2 * theirs


TINY = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 10000.0,
}  # fmt: skip
CAUSAL = {
    "llama": transformers.LlamaConfig(**TINY),
    "llama3_rope_tied": transformers.LlamaConfig(**TINY, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama_biases": transformers.LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "mistral_sliding": transformers.MistralConfig(**TINY, sliding_window=5),
    "mistral_head_dim": transformers.MistralConfig(**TINY, sliding_window=None, head_dim=20),
    "qwen2": transformers.Qwen2Config(**TINY),
    "qwen2_half_sliding": transformers.Qwen2Config(
        **TINY, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen2_sliding_nowhere": transformers.Qwen2Config(
        **TINY, use_sliding_window=True, sliding_window=4, max_window_layers=3
    ),
}


@pytest.fixture(scope="module", params=list(CAUSAL))
def torch_model(request):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CAUSAL[request.param], attn_implementation="eager").eval()
    with torch.no_grad():  # biases start at zero and norms at one: make them count
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def torch_logits(model, tokens, mask=None):
    mask = None if mask is None else torch.tensor(mask, dtype=torch.long)
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=mask).logits.numpy()


def test_causal_families_match_transformers_in_both_directions(torch_model, tmp_path):
    torch_model.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(0, 96, (2, 20))
    np.testing.assert_allclose(model(tokens), torch_logits(torch_model, tokens), atol=ATOL)

    mask = np.arange(20)[None] >= np.array([[0], [6]])
    padded = np.asarray(model(tokens, attention_mask=mask))
    np.testing.assert_allclose(padded[mask], torch_logits(torch_model, tokens, mask)[mask], atol=ATOL)

    for parameter in jax.tree.leaves(model.blocks.up_proj.kernel):  # a change of ours must arrive there
        model.blocks.up_proj.kernel[...] = parameter * 1.5
    save_pretrained(model, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    np.testing.assert_allclose(model(tokens), torch_logits(back, tokens), atol=ATOL)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
    tokens = np.arange(1, 13)[None]

    def gradient(policy):
        model = load_pretrained(FIXTURES / "llada_tiny", remat=policy)
        return nnx.grad(lambda m: jnp.mean(jnp.square(m.logits(m.hidden_states(tokens)))))(model)

    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    jax.tree.map(close, nnx.to_pure_dict(gradient("none")), nnx.to_pure_dict(gradient(remat)))


def test_the_gradients_of_an_adapter_are_those_of_pytorch():
    rng = np.random.default_rng(0)
    x, g, w, a, b = (rng.standard_normal(shape, np.float32) for shape in [(2, 5, 8), (2, 5, 6), (8, 6), (8, 3), (3, 6)])

    def loss(x, a, b):
        linear = Linear(8, 6, axes=("embed", "mlp"), dtypes=DTypes(), rngs=nnx.Rngs(0))
        linear.kernel[...] = w
        attach(linear, LoRAConfig(rank=3, alpha=6.0), a, b)
        return jnp.sum(linear(x) * g)

    theirs = [torch.tensor(array, requires_grad=True) for array in (x, a, b)]
    tx, ta, tb = theirs
    ((tx @ torch.tensor(w) + 2 * (tx @ ta) @ tb) * torch.tensor(g)).sum().backward()
    for ours, tensor in zip(jax.grad(loss, argnums=(0, 1, 2))(x, a, b), theirs, strict=True):
        np.testing.assert_allclose(ours, tensor.grad, rtol=1e-5, atol=1e-5)


def test_published_configs_are_understood():
    """Shapes of the published checkpoints, from the numbers in their config.json."""
    llada = json.loads((FIXTURES / "llada_tiny" / "config.json").read_text()) | {
        "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288,
        "vocab_size": 126464, "embedding_size": 126464, "mask_token_id": 126336, "eos_token_id": 126081,
    }  # fmt: skip
    config = ModelConfig.from_hf(llada)

    num_params = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract_model(config, DTypes()))))
    assert num_params == 8_015_581_184  # as the model card gives it: 8.02 B
    assert (config.mask_id, config.eos_id, config.is_causal, config.shift_logits) == (126336, 126081, False, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"alibi": True}, "alibi=True"),
        ({"activation_type": "gelu"}, "activation_type='gelu'"),
        ({"include_bias": True}, "include_bias=True with weight_tying=False.*bias"),
        ({"include_bias": True, "weight_tying": True, "bias_for_layer_norm": None}, "bias_for_layer_norm=None"),
        ({"bias_for_layer_norm": True}, "bias_for_layer_norm=True"),
        ({"n_kv_heads": 3}, "4 attention heads and 3 key/value heads, which must divide the former"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    hf_config = load_config(FIXTURES / "llada_tiny").hf_config
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(hf_config | change)


def test_a_null_bias_of_the_norms_is_that_of_the_other_layers():
    hf_config = load_config(FIXTURES / "llada_tiny").hf_config
    for biases in ({"include_bias": False}, {"include_bias": True, "weight_tying": True}):
        config = ModelConfig.from_hf(hf_config | {"bias_for_layer_norm": False} | biases)
        assert config.mlp_bias == config.out_bias == biases["include_bias"]
    null = ModelConfig.from_hf(hf_config | {"bias_for_layer_norm": None})
    assert dataclasses.replace(null, hf_text="") == dataclasses.replace(ModelConfig.from_hf(hf_config), hf_text="")


@pytest.mark.parametrize("nothing", [None, -1, []])
def test_a_special_token_that_is_none(nothing):
    """LLaMA 1 wrote -1 for it."""
    hf_config = load_config(FIXTURES / "llada_tiny").hf_config
    config = ModelConfig.from_hf(hf_config | {"pad_token_id": nothing, "eos_token_id": nothing})
    assert (config.pad_id, config.eos_id, config.padding_id) == (None, None, 0)


def test_unknown_rope_scaling_is_refused():
    hf_config = load_config(FIXTURES / "dream_tiny").hf_config
    with pytest.raises(ValueError, match="'yarn'"):
        ModelConfig.from_hf(hf_config | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})


def test_a_missing_size_is_named():
    hf_config = load_config(FIXTURES / "llada_tiny").hf_config
    del hf_config["n_layers"]
    with pytest.raises(ValueError, match="n_layers"):
        ModelConfig.from_hf(hf_config)


def test_every_parameter_names_its_axes():
    model = Transformer(dataclasses.replace(load_config(FIXTURES / "dream_tiny"), out_bias=True, mlp_bias=True))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        axes = logical_axes(variable)
        assert len(axes) == len(variable.shape) and set(axes) <= RULES.keys(), (path, axes)
