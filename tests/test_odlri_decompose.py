"""Decomposition: the recorded runs replayed, the improved mode below every one of them, and inputs that are refused."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from odlri_jax import DecomposeConfig, decompose, decompose_arrays, decompose_stack

INITS = {"zero": "zero", "svd_aa": "svd", "svd_w": "svd_w", "odlri": "odlri"}
FILES = ("run_64x128_r16", "run_128x256_r16")
SMALL = DecomposeConfig(rank=8, num_outliers=4, init="svd", outer_iters=3, inner_iters=2, tune_iters=1)
QUICK = {"q_codebook": "uniform", "group": 16}  # to compile


@pytest.fixture(scope="module")
def recorded(fixtures):
    """Of each file its arrays, its recorded runs by name, and their number of sweeps."""
    metrics = json.loads((fixtures / "odlri" / "metrics.json").read_text())
    files = []
    for name in FILES:
        with np.load(fixtures / "odlri" / f"{name}.npz") as file:
            files.append((dict(file), metrics[name]["runs"], metrics[name]["quip_tune_iters"]))
    return files


def run(arrays, name, **settings):
    init, num_outliers, basis, bits = re.fullmatch(r"(.*?)(\d*)_(had|nohad)_lr(\d+)", name).groups()
    config = DecomposeConfig(
        rank=16, num_outliers=int(num_outliers or 1), init=INITS[init], lr_bits=int(bits), hadamard=basis == "had",
        **settings,
    )  # fmt: skip
    return decompose(arrays["W"], arrays["H_raw"], config, jax.random.key(0), signs=(arrays["SV"], arrays["SU"]))


def relative_error(w, approximation, h):
    error = np.asarray(w, np.float64) - np.asarray(approximation, np.float64)
    return np.sqrt(np.trace(error @ h @ error.T) / np.trace(w.astype(np.float64) @ h @ w.T))


BITS = ["16", pytest.param("4", marks=pytest.mark.slow)]


@pytest.mark.parametrize("bits", BITS)
def test_published_mode_replays_every_recorded_run(recorded, bits):
    """Start by start: the first scale of Q, and the best error.

    Roundings near a tie part ways, and the published sweeps, which may go up, amplify it: W changed by 1e-7 moves the
    best error of a single run by up to a tenth. So a run is held to a wide bound, which the best of up to six such W
    must keep (weaker than the run itself: odlri4_had_lr16 can miss it, and so can its median), and all runs together,
    as they are, to 3%.
    """
    ratios = []
    for arrays, runs, tune_iters in recorded:
        for name, expected in runs.items():
            if not name.endswith(f"lr{bits}"):
                continue
            d = run(arrays, name, tune_iters=tune_iters, published=True)
            assert float(d.q_scales[0]) == pytest.approx(expected["Q_scale"][0], rel=1e-4), name
            assert float(d.weight_scale) == pytest.approx(expected["global_scale"], rel=1e-5), name
            ratios.append(float(d.error) / expected["best"])
            draws = [ratios[-1]]
            while abs(draws[-1] - 1) > (0.05 if bits == "16" else 0.15):
                assert len(draws) < 6, (name, draws)
                w = arrays["W"] * (1 + 1e-7 * np.random.default_rng(len(draws)).standard_normal(arrays["W"].shape))
                changed = arrays | {"W": w.astype(np.float32)}
                draws.append(float(run(changed, name, tune_iters=tune_iters, published=True).error) / expected["best"])
            if name in ("odlri4_nohad_lr16", "zero_nohad_lr16"):  # here the first iteration stays together
                assert float(d.errors_after_q[0]) == pytest.approx(expected["err_after_Q"][0], rel=0.01)
                assert float(d.errors[0]) == pytest.approx(expected["err_after_LR"][0], rel=0.01)
    assert len(ratios) == {"16": 14, "4": 12}[bits]
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("bits", BITS)
def test_the_improved_mode_ends_below_every_recorded_run(recorded, bits):
    ratios = []
    for arrays, runs, tune_iters in recorded:
        for name, expected in runs.items():
            if not name.endswith(f"lr{bits}"):
                continue
            d = run(arrays, name, tune_iters=tune_iters, inner_iters=3)  # of 10 recorded
            assert float(d.error) <= expected["best"], name
            ratios.append(float(d.error) / expected["best"])
            assert relative_error(arrays["W"], d.dense(), arrays["H"]) == pytest.approx(float(d.error), rel=1e-3)
            # A low-rank step never raises the error it finds. Factors on the lattice have no pair to beat at first.
            first = 0 if name.endswith("lr16") else 1
            assert (d.errors[first:] <= d.errors_after_q[first:] * (1 + 1e-4)).all(), name
    assert np.exp(np.mean(np.log(ratios))) < {"16": 1, "4": 0.8}[bits]


def problem(m=16, n=32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, n)) * np.where(np.arange(n) % 11 == 0, 8, 1)
    return rng.standard_normal((m, n)).astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def test_auto_takes_the_best_start():
    w, h = problem()
    errors = {}
    for init in ("zero", "svd", "odlri", "auto"):
        d = decompose(w, h, dataclasses.replace(SMALL, init=init), jax.random.key(0))
        errors[init] = float(d.error)
        assert d.init[0] == init or init == "auto"
    assert errors["auto"] <= min(errors.values()) * 1.02


def meshes(axis):
    """All devices as `Mesh` lays them out, and as `jax.make_mesh` does, whose axes are Explicit."""
    return Mesh(np.array(jax.devices()), (axis,)), jax.make_mesh((len(jax.devices()),), (axis,))


def test_a_mesh_and_a_stack_give_the_same_result():
    w, h = problem()
    alone = decompose(w, h, SMALL, jax.random.key(0))
    for mesh in meshes("rows"):
        on_mesh = decompose(w, h, SMALL, jax.random.key(0), mesh=mesh)
        np.testing.assert_array_equal(alone.q, on_mesh.q)
        np.testing.assert_array_equal(alone.errors, on_mesh.errors)


@pytest.mark.default_compiler
def test_a_stack_gives_each_matrix_what_it_gets_alone_on_any_number_of_devices():
    problems = [problem(seed=seed) for seed in range(3)]
    w, h = (np.stack(arrays) for arrays in zip(*problems, strict=True))
    keys = jax.random.split(jax.random.key(0), 3)
    stack = decompose_stack(w, h, SMALL, keys)
    for mesh in meshes("stack"):
        on_mesh = decompose_stack(w, h, SMALL, keys, mesh)
        jax.tree.map(np.testing.assert_array_equal, stack, on_mesh)
    for i in range(3):
        assert float(stack.error[i]) == pytest.approx(float(decompose(w[i], h[i], SMALL, keys[i]).error), rel=0.02)


def test_where_jax_computes_in_float64_the_result_is_float32_all_the_same():
    config = dataclasses.replace(SMALL, **QUICK)
    with jax.enable_x64(True):
        d = jax.eval_shape(lambda w, h: decompose_arrays(w, h, config, jax.random.key(0)), *problem())
    assert {x.dtype for x in jax.tree.leaves(d)} == {np.dtype(np.float32), np.dtype(np.int32)}  # int32: the start


@pytest.mark.parametrize("transform", [jax.jit, lambda f: lambda w, h: jax.vmap(f)(w[None], h[None])])
def test_under_jit_and_vmap_the_function_without_checks_is_named_and_works(transform):
    def run(function):
        return transform(lambda w, h: function(w, h, SMALL, jax.random.key(0)).q)

    with pytest.raises(ValueError, match="call decompose_arrays inside them, or decompose_stack"):
        run(decompose)(*problem())
    assert jax.eval_shape(run(decompose_arrays), *problem()).shape[-2:] == (16, 32)


def test_rounds_that_sixteen_bit_factors_do_not_take_change_no_program():
    """Nor are the first iterations of auto computed twice, where a run is so short that they are all."""

    def program(inner_iters):
        config = dataclasses.replace(SMALL, init="auto", inner_iters=inner_iters, **QUICK)
        return jax.jit(lambda w, h: decompose_arrays(w, h, config, jax.random.key(0))).lower(*problem()).as_text()

    assert program(2) == program(10)


def test_sixteen_bit_factors_are_float16_numbers():
    w, h = problem()
    d = decompose(w, h, SMALL, jax.random.key(0))
    for factor in (d.left, d.right):
        np.testing.assert_array_equal(factor, np.asarray(factor).astype(np.float16).astype(np.float32))
    damped = h / np.mean(np.diag(h)) + 1e-2 * np.eye(32)
    assert relative_error(w, d.dense(), damped) == pytest.approx(float(d.error), rel=1e-4)


def test_roles_and_bits():
    w, h = problem()
    d = decompose(w, h, SMALL, jax.random.key(0))
    damped = h / np.mean(np.diag(h)) + 1e-2 * np.eye(32)
    size = np.sqrt(np.trace(w @ damped @ w.T))
    for role, part in ((d.q_role, np.asarray(d.dense_q())), (d.lr_role, np.asarray(d.dense_low_rank()))):
        assert float(role) == pytest.approx(np.sqrt(np.trace(part @ damped @ part.T)) / size, rel=1e-3)
    # 2 bits, 8 (16 + 32) factors of 16 bits, two scalars, 48 signs.
    assert d.num_bits_per_weight == pytest.approx((2 * 512 + 16 * 8 * 48 + 64 + 48) / 512)


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, h: (w, h[:-1]), r"H \(n, n\)"),
        (lambda w, h: (w, h[:24, :24]), r"H must be \(32, 32\)"),
        (lambda w, h: (w[:, :28], h[:28, :28]), "28 columns are not a multiple of 8"),
        (lambda w, h: (w[:4], h), r"rank=8 is above min\(m, n\) = 4"),
        (lambda w, h: (changed(w, (0, 0), np.nan), h), "W .* not finite"),
        (lambda w, h: (w, changed(h, (1, 1), np.inf)), "H .* not finite"),
        (lambda w, h: (w, changed(h, (0, 1), 50)), "not symmetric"),
        (lambda w, h: (w, changed(h, (3, 3), -5)), "indefinite"),
        (lambda w, h: (w, np.float32(3e36) * h), r"H \(32, 32\): the sum of its diagonal is beyond float32. Divide H"),
        (lambda w, h: (0 * w, h), "zero everywhere.* set one weight to a small number"),
    ],
)
def test_inputs_that_cannot_be_decomposed_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        decompose(*change(*problem()), SMALL, jax.random.key(0))


@pytest.mark.parametrize("bits", BITS)
def test_an_alternation_that_is_never_finite_is_refused(bits):
    """H is definite as it is; rotated, its smallest eigenvalue is below what float32 tells apart from zero."""
    h = np.diag(np.where(np.arange(32), 1, 1e10)).astype(np.float32)
    config = dataclasses.replace(SMALL, lr_bits=int(bits), ridge=0.0, **QUICK)
    with pytest.raises(ValueError, match="did not stay finite; raise ridge=0.0"):
        decompose(problem()[0], h, config, jax.random.key(0))


def test_a_dead_layer_warns_and_uses_the_identity():
    w, h = problem()
    with pytest.warns(UserWarning, match="no input reached"):
        d = decompose(w, 0 * h, SMALL, jax.random.key(0))
    assert relative_error(w, d.dense(), np.eye(32)) == pytest.approx(float(d.error), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "random"}, "zero, svd, svd_w, odlri, auto"),
        ({"lr_bits": 8}, "16 bits, or 4, 3 or 2"),
        ({"rank": 12, "lr_bits": 4}, "multiple of 8"),
        ({"q_bits": 5}, "2, 3 or 4 bits"),
        ({"outer_iters": 0}, "at least 1"),
        ({"num_outliers": 0}, "num_outliers=0 must be at least 1"),
        ({"inner_iters": 0, "lr_bits": 4}, "inner_iters=0 must be at least 1"),
        ({"tune_iters": -1}, "tune_iters=-1 must be at least 0"),
        ({"group": 0}, "group=0: .* give a multiple of 8"),
        ({"ridge": -0.1}, "ridge=-0.1 .* give 0 or more"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DecomposeConfig(**settings)


@pytest.mark.parametrize("init", ["zero", "svd", "svd_w"])
def test_what_has_no_meaning_may_be_zero(init):
    DecomposeConfig(init=init, num_outliers=0, inner_iters=0, lr_bits=16)


def test_outliers_above_the_rank_are_truncated_and_above_the_width_refused():
    w, h = problem()
    many = dataclasses.replace(SMALL, init="odlri", num_outliers=20)
    assert float(decompose(w, h, many, jax.random.key(0)).error) < 1
    with pytest.raises(ValueError, match="num_outliers=33 is above the 32 columns"):
        decompose(w, h, dataclasses.replace(many, num_outliers=33), jax.random.key(0))
