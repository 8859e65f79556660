"""A mesh changes where numbers live, not the numbers: eight virtual devices against one."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

import a2d_jax
from a2d_jax.assembly import assemble, with_adapter
from a2d_jax.data import Batch
from a2d_jax.mesh_flag import SizesParser
from a2d_jax.models.lora import LoRAConfig
from a2d_jax.settings import RunConfig
from a2d_jax.sharding import make_mesh
from a2d_jax.training import OptimizerConfig, init_state, pure, split_model

FIXTURES = Path(__file__).parent / "fixtures"
NUM_ROWS, LENGTH = 16, 12
# A large eps keeps AdamW from turning rounding errors of tiny gradients into steps of full size.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, eps=1e-2, clip_norm=10.0)


def clean_batch() -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 240, (NUM_ROWS, LENGTH)).astype(np.int32)
    is_response = np.arange(LENGTH) >= rng.integers(2, 6, (NUM_ROWS, 1))
    attention_mask = np.ones(tokens.shape, bool)
    attention_mask[:, -2:] = is_response[:, -2:] = False  # a bucket's unused columns
    return Batch(tokens, is_response, attention_mask, np.arange(NUM_ROWS) % 3 > 0)


def two_updates(family: str, sizes: tuple[int, int, int], has_adapter: bool, grad_accum_steps: int):
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    lora = LoRAConfig(rank=4, alpha=8, dropout=0.0) if has_adapter else None
    run = RunConfig(optimizer=OPTIMIZER, lora=lora, batch_size=NUM_ROWS, grad_accum_steps=grad_accum_steps, seed=1)
    base = a2d_jax.load_pretrained(FIXTURES / f"{family}_tiny", mesh=mesh)
    assembled = assemble(run, base, mesh, num_steps=2, mask_id=base.config.mask_id, refusal_id=base.config.eos_id)
    _, trained, frozen = split_model(with_adapter(base, run))
    start = functools.partial(init_state, optimizer=assembled.optimizer)
    shardings, update = assembled.shardings, assembled.update
    state = jax.jit(start, out_shardings=shardings.state)(jax.device_put(pure(trained), shardings.state.params))
    frozen = jax.device_put(pure(frozen), shardings.frozen)
    batch = jax.device_put(clean_batch(), shardings.batch)
    losses = []
    with jax.set_mesh(mesh):
        for _ in range(2):
            state, metrics = update(state, frozen, batch)
            losses.append({name: float(value) for name, value in metrics.items()})
    return losses, state


@functools.cache
def on_one_device(family: str, has_adapter: bool):
    losses, state = two_updates(family, (1, 1, 1), has_adapter, grad_accum_steps=1)
    return losses, jax.tree.map(np.asarray, (state.params, state.opt_state))


@pytest.mark.parametrize(
    "family, sizes, has_adapter, grad_accum_steps",
    [
        ("llada", (2, 2, 2), False, 2),
        ("llada", (1, 8, 1), False, 1),
        ("dream", (2, 2, 2), True, 1),
    ],
)
def test_two_updates_on_a_mesh_equal_those_on_one_device(family, sizes, has_adapter, grad_accum_steps):
    losses, state = two_updates(family, sizes, has_adapter, grad_accum_steps)
    expected_losses, expected = on_one_device(family, has_adapter)
    for ours, theirs in zip(losses, expected_losses, strict=True):
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-4, err_msg=name)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(np.abs(theirs).max(), 1e-6)),
        (state.params, state.opt_state),
        expected,
    )


def test_weights_and_their_moments_are_split_and_the_state_stays_where_it_was():
    _, state = two_updates("llada", (2, 2, 2), False, 2)
    kernel = state.params["blocks"]["gate_proj"]["kernel"]  # (L, D, F): D over fsdp, F over tensor
    assert kernel.addressable_shards[0].data.shape == (kernel.shape[0], kernel.shape[1] // 2, kernel.shape[2] // 2)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert len(moments) >= 2
    assert all(moment.sharding.is_equivalent_to(kernel.sharding, kernel.ndim) for moment in moments[:2])
    assert state.step.sharding.is_fully_replicated


def test_sizes_on_the_command_line():
    assert SizesParser().parse("1,-1,4") == (1, -1, 4)
    for text in ("1x1x4", "1,4", "1,1,two", ""):
        with pytest.raises(ValueError, match="give three whole numbers, the sizes of data,fsdp,tensor"):
            SizesParser().parse(text)


def test_sizes_that_do_not_fit_the_devices_are_refused():
    with pytest.raises(ValueError, match="does not use the 8 devices"):
        make_mesh(3, 1, 1)
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
