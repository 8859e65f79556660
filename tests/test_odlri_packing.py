"""Packed arrays: bit-exact for every codebook, readable from the format's description alone, and checked when read."""

import dataclasses

import jax
import numpy as np
import packed_reader
import pytest
import safetensors.numpy
from packed_folders import random_arrays

from odlri_jax import DecomposeConfig, decompose
from odlri_jax.codebooks import E8P12
from odlri_jax.packed_tensors import matrix_bits
from odlri_jax.packing import pack, unpack

SHAPE = (40, 96)  # 40 = 20 x 2, 96 = 12 x 8: two odd factors
CONFIG = DecomposeConfig(rank=8, group=32)
_SETTINGS = {
    "2 bits": {},
    "3 bits": {"q_bits": 3},
    "4 bits": {"q_bits": 4, "lr_bits": 4},
    "4 bits, no rotation": {"q_bits": 4, "hadamard": False},
    "uniform": {"q_codebook": "uniform", "q_bits": 3, "lr_bits": 2},
    "normal_float": {"q_codebook": "normal_float", "q_bits": 5, "lr_bits": 3, "hadamard": False},
    "published": {"published": True, "lr_bits": 4, "hadamard": False},
    "published, rotated": {"published": True, "lr_bits": 2},
}
CASES = {name: (SHAPE, dataclasses.replace(CONFIG, **settings)) for name, settings in _SETTINGS.items()}
CASES["rows no multiple of 8"] = ((20, 96), CONFIG)


def same_bits(a, b) -> bool:
    return np.array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@pytest.mark.parametrize("case", CASES)
def test_what_was_packed_comes_back_bit_for_bit(case):
    shape, config = CASES[case]
    arrays = random_arrays(shape, config)
    d = unpack(arrays, config, shape)
    # The reader that was written from the description reads the same values,
    settings = dataclasses.asdict(config)
    for name, part in zip(("q", "left", "right"), packed_reader.parts(arrays, settings), strict=True):
        assert same_bits(part.astype(np.float32), getattr(d, name)), name
    np.testing.assert_allclose(packed_reader.dense(arrays, settings), d.dense(), atol=2e-6)
    # and values give back the arrays they came from.
    again = pack(d)
    assert again.keys() == arrays.keys()
    for name, array in arrays.items():
        assert again[name].dtype == array.dtype and np.array_equal(again[name], array), name


@pytest.mark.parametrize("published", [False, True])
def test_the_result_of_a_decomposition_packs(published):
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((16, 32)).astype(np.float32), rng.standard_normal((99, 32))
    config = DecomposeConfig(
        rank=4, num_outliers=2, init="zero", outer_iters=1, inner_iters=1, tune_iters=1, published=published
    )
    d = decompose(w, (x.T @ x / 99).astype(np.float32), config, jax.random.key(0))
    assert same_bits(unpack(pack(d), config, w.shape).dense(), d.dense())


def test_a_matrix_that_its_factors_hold_in_full_packs():
    """W is zero but for the two strong channels, which the start takes whole: nothing is left for Q."""
    rng = np.random.default_rng(0)
    is_strong = np.arange(32) < 2
    w, x = rng.standard_normal((16, 32)) * is_strong, rng.standard_normal((99, 32)) * np.where(is_strong, 9, 1)
    config = DecomposeConfig(
        rank=4, num_outliers=2, init="odlri", outer_iters=1, inner_iters=1, tune_iters=1, hadamard=False
    )
    d = decompose(w, x.T @ x / 99, config, jax.random.key(0))
    np.testing.assert_allclose(unpack(pack(d), config, w.shape).dense(), w, atol=1e-2)


def test_every_word_is_a_point_of_its_own():
    points = np.asarray(jax.jit(E8P12.decode)(np.arange(1 << 16)))
    assert same_bits(points, packed_reader.POINTS)
    assert len(np.unique(points, axis=0)) == 1 << 16


@pytest.mark.parametrize(
    "settings, by_hand",
    [
        # 2 bits a weight, 16-bit factors of rank 16, 2 scales, 64 + 256 signs
        ({}, 2 + 16 * 16 * (64 + 256) / (64 * 256) + (2 * 32 + 64 + 256) / (64 * 256)),
        ({"q_bits": 3, "lr_bits": 3}, 3 + 3 * 16 * (64 + 256) / (64 * 256) + (4 * 32 + 64 + 256) / (64 * 256)),
        ({"q_codebook": "uniform", "q_bits": 5, "hadamard": False}, 5 + 32 / 64 + 16 * 16 * 320 / 16384 + 32 / 16384),
    ],
)
def test_the_size_is_that_of_the_files(tmp_path, settings, by_hand):
    shape, config = (64, 256), DecomposeConfig(rank=16, group=64, **settings)
    assert matrix_bits(shape, config) == pytest.approx(by_hand, rel=1e-6)
    arrays = {f"layers.{i}.{name}": array for i in range(8) for name, array in random_arrays(shape, config, i).items()}
    safetensors.numpy.save_file(arrays, tmp_path / "packed")
    header = int.from_bytes((tmp_path / "packed").read_bytes()[:8], "little") + 8
    measured = ((tmp_path / "packed").stat().st_size - header) * 8 / (8 * 64 * 256)
    assert measured == pytest.approx(by_hand, rel=0.01)


def test_values_off_the_codebook_are_not_packed():
    d = unpack(random_arrays(SHAPE, CONFIG), CONFIG, SHAPE)
    with pytest.raises(ValueError, match="1 of 3840 entries of 'q' are not values of the codebook E8P12"):
        pack(dataclasses.replace(d, q=d.q.at[3, 5].add(0.01)))
    with pytest.raises(ValueError, match="'left'.*float16"):
        pack(dataclasses.replace(d, left=d.left.at[3, 5].add(1e-5)))


def test_bad_arrays_are_listed_in_one_error():
    config = dataclasses.replace(CONFIG, lr_bits=4)
    arrays = random_arrays(SHAPE, config)
    indices = arrays["q_index"].astype(np.int32)
    indices[2, 3] = 70000
    arrays |= {"q_index": indices, "left_index": arrays["left_index"].astype(np.int64), "other": np.zeros(3)}
    arrays |= {"weight_scale": np.float32(np.nan), "left_scale": np.float32(0), "right_index": np.zeros((8, 8), "u2")}
    del arrays["right_scale"]
    with pytest.raises(ValueError) as error:
        unpack(arrays, config, SHAPE)
    for problem in (
        "q_index holds the index 70000, out of the codebook's 0 to 65535", "left_index is int64, needed uint16",
        "extra: other (3,)", "weight_scale holds a value that is not finite", "left_scale holds 0.0",
        "misshapen: right_index is (8, 8), needed (8, 12)", "missing: right_scale ()",
    ):  # fmt: skip
        assert problem in str(error.value)
