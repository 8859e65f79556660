"""A reader of packed checkpoints in NumPy, written from docs/packed_format.md alone."""

import itertools
import json
import statistics
from pathlib import Path

import numpy as np
import safetensors.numpy

NORM_12 = "f1f2f4f8375767 97a7c73b5b6b9babcb3d5d6d9dadce3e5e6e9eaeec73"
MODULES = {
    "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj", "gate_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "down_proj": "mlp.down_proj",
}  # fmt: skip


def e8p_points() -> np.ndarray:
    """(65536, 8) float32."""
    patterns = [p for p in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(x * x for x in p) <= 10]
    patterns += [[1.5 if byte >> i & 1 else 0.5 for i in range(8)] for byte in bytes.fromhex(NORM_12)]
    points = np.empty((256, 256, 8), np.float32)
    for high, pattern in enumerate(patterns):
        for low in range(256):
            point = np.array(pattern)
            for k, coordinate in enumerate((2, 4, 6, 1, 3, 5, 7), start=1):
                if low >> k & 1:
                    point[[0, coordinate]] *= -1
            if pattern.count(1.5) % 2:
                point[7] *= -1
            points[high, low] = point + (0.25 if low.bit_count() % 2 == 0 else -0.25)
    return points.reshape(-1, 8)


def e8_points() -> np.ndarray:
    whole = [p for p in itertools.product((-1, 0, 1), repeat=8) if sum(x != 0 for x in p) in (0, 2)]
    half = [p for p in itertools.product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0]
    unit = np.eye(8).tolist()
    return np.array(whole + half + [np.multiply(2, e) for e in unit] + [np.multiply(-2, e) for e in unit[:7]], "f4")


POINTS, E8 = e8p_points(), e8_points()


def lattice(arrays, prefix: str) -> np.ndarray:
    value, residual = POINTS[arrays[f"{prefix}_index"]], arrays.get(f"{prefix}_residual")
    if residual is not None:
        second, s = (E8, 2.04) if residual.dtype == np.uint8 else (POINTS, 3.45)
        value = value + second[residual] / np.float32(s)
    return value.reshape(len(value), -1)


def levels(name: str, bits: int) -> np.ndarray:
    if name == "uniform":
        return np.linspace(-1, 1, 2**bits).astype(np.float32)
    h, z = 2 ** (bits - 1), statistics.NormalDist().inv_cdf
    o = 1 - (1 / (2 * (2**bits - 1)) + 1 / 2 ** (bits + 1)) / 2
    values = [z(p) for p in np.linspace(o, 0.5, h + 1)[:h]] + [-z(p) for p in np.linspace(o, 0.5, h)[: h - 1]] + [0]
    return (np.sort(values) / max(values)).astype(np.float32)


def parts(arrays, settings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q (m, n), L (m, r), R (r, n) in the bases they are stored in."""
    if settings["q_codebook"] == "e8p":
        q = lattice(arrays, "q") * arrays["q_scale"]
    else:
        bits = np.unpackbits(arrays["q_index"], axis=1, bitorder="little")
        fields = bits.reshape(len(bits), -1, settings["q_bits"]) @ (1 << np.arange(settings["q_bits"]))
        scale = np.repeat(arrays["q_scale"], settings["group"], axis=1)
        q = levels(settings["q_codebook"], settings["q_bits"])[fields] * scale
    if settings["lr_bits"] == 16:
        return q, arrays["left"].astype(np.float32), arrays["right"].astype(np.float32)
    left, right = (lattice(arrays, name) * arrays[f"{name}_scale"] for name in ("left", "right"))
    return q, left.T if settings["published"] else left, right


def jacobsthal(q: int) -> np.ndarray:
    squares = {x * x % q for x in range(1, q)}
    character = np.array([0] + [1 if x in squares else -1 for x in range(1, q)])
    return character[(np.arange(q)[None] - np.arange(q)[:, None]) % q]


def orthogonal(n: int) -> np.ndarray:
    """U_n for powers of two and the orders below; float64."""
    odd = n // (n & -n)
    if odd == 1:
        kernel = np.ones((1, 1))
    elif odd in (3, 5, 11):  # Paley I, orders 12, 20 and 44
        kernel = np.eye(4 * odd)
        kernel[0], kernel[1:, 0] = 1, -1
        kernel[1:, 1:] += jacobsthal(4 * odd - 1)
    elif odd == 9:  # Paley II, order 36
        conference = np.ones((18, 18)) - np.eye(18)
        conference[1:, 1:] = jacobsthal(17)
        kernel = np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(18), [[1, -1], [-1, -1]])
    power = np.arange(n // len(kernel))
    sylvester = 1 - 2.0 * (np.bitwise_count(power[:, None] & power) % 2)
    return np.kron(kernel, sylvester) / np.sqrt(n)


def dense(arrays, settings) -> np.ndarray:
    """The (m, n) matrix, float64."""
    q, left, right = (part.astype(np.float64) for part in parts(arrays, settings))
    m, n = q.shape

    def rotated_back(a):
        signs = [1 - 2.0 * np.unpackbits(arrays[f"signs_{side}"], bitorder="little") for side in ("out", "in")]
        return signs[0][:m, None] * (orthogonal(m).T @ a @ orthogonal(n)) * signs[1][:n]

    low_rank = left @ right
    rotates_factors = settings["hadamard"] or (settings["lr_bits"] < 16 and not settings["published"])
    w = (rotated_back(q) if settings["hadamard"] else q) + (rotated_back(low_rank) if rotates_factors else low_rank)
    return w * arrays["weight_scale"]


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a packed folder of the LLaMA family under its dense name."""
    manifest = json.loads((folder / "odlri.json").read_text())
    assert manifest["format"] == "odlri" and manifest["version"] == 1
    num_layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    tensors = {}
    for file in files:
        tensors |= safetensors.numpy.load_file(folder / file)
    for path in manifest["projections"]:
        name = path.removeprefix("blocks.")
        modules = [f"model.layers.{i}.{MODULES[name]}" for i in range(num_layers)] if name in MODULES else [name]
        for module in modules:
            taken = [key for key in tensors if key.startswith(f"{module}.") and not key.endswith((".weight", ".bias"))]
            arrays = {key.rsplit(".", 1)[1]: tensors.pop(key) for key in taken}
            tensors[f"{module}.weight"] = dense(arrays, manifest["settings"])
    return tensors
