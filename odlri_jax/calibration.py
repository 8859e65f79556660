"""Calibration: H = X X^T / tokens for the input X (n, tokens) of every linear layer.

Linear layers that read the same vector share one H: q, k, v; gate, up. The sums run on the device over batches of
token windows, a group of layers at a time: 2 n^2 float32 numbers for each input of the group are all that is held
beside the model. Products of float32 are taken at the highest precision; what each addition of a batch rounds away is
caught exactly (two-sum) and added back at the end, so that the number of batches costs no accuracy. On a mesh the
batch is split over its batch axes and H by rows over all of it.

The files, and who reads them (`Calibration`):

    OUT/calibration.json           settings and counts; written last: where it is, the folder is complete
    OUT/layer_000.safetensors ...  float32 "attn" (input of q, k, v), "o", "mlp" (gate, up), "down", each (n, n)
    OUT/head.safetensors           "head": the output of the final norm; on request
"""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from safetensors import SafetensorError, safe_open

from a2d_jax.config import DIFFUSION_FAMILIES, ModelConfig
from a2d_jax.distributed import whole
from a2d_jax.masking import corrupt
from a2d_jax.models.transformer import Block, LayerContext, Transformer
from a2d_jax.sharding import constrain, mesh_of, partition_spec

FORMAT, VERSION = "odlri-calibration", 1
CALIBRATION_NAME = "calibration.json"
# Which H belongs to which linear layer.
INPUT_OF = {
    "q_proj": "attn", "k_proj": "attn", "v_proj": "attn", "o_proj": "o",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "down", "lm_head": "head",
}  # fmt: skip
_TAPS = {"attn": "q_proj", "o": "o_proj", "mlp": "gate_proj", "down": "down_proj"}  # who is listened to for each input

ROWS = ("rows", None)  # how an H is split over a mesh


def input_widths(config: ModelConfig) -> dict[str, int]:
    """n of each input within a layer."""
    heads = config.num_heads * config.head_dim
    return {"attn": config.width, "o": heads, "mlp": config.width, "down": config.mlp_dim}


# -- sums on the device -----------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Sums of x x^T over tokens, by input: `total + lost` is the sum, `lost` what rounding took from `total`."""

    total: dict[str, jax.Array]  # (n, n) float32; "attn", "o", "mlp", "down" of a layer, or "head"
    lost: dict[str, jax.Array]


Group = dict[int | None, Moments]  # layers that follow one another -> their sums; None: the head's


def zero_moments(model: Transformer, layers: range, has_head: bool = False) -> Group:
    """Sums over no token, for a group of layers, on the model's devices."""
    mesh = mesh_of(model)

    def zeros(widths: dict[str, int]) -> dict[str, jax.Array]:
        arrays = {}
        for name, n in widths.items():
            place = jax.devices()[0]
            if mesh is not None:
                place = NamedSharding(mesh, partition_spec(ROWS, (n, n), mesh))
            arrays[name] = jnp.zeros((n, n), jnp.float32, device=place)
        return arrays

    widths = input_widths(model.config)
    group: Group = {layer: Moments(zeros(widths), zeros(widths)) for layer in layers}
    if has_head:
        widths = {"head": model.config.width}
        group[None] = Moments(zeros(widths), zeros(widths))
    return group


def product_sum(x: jax.Array, is_counted: jax.Array) -> jax.Array:
    """Sum of x x^T over the counted positions of x (B, T, n), (n, n) float32."""
    x = jnp.where(is_counted[..., None], x, 0)
    # bfloat16 inputs are multiplied as they are: their products are exact in float32.
    h = jnp.einsum("bti,btj->ij", x, x, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return constrain(h, *ROWS)


def add_exactly(total: jax.Array, lost: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(total + new, lost + the rounding error of that sum), by Knuth's two-sum."""
    rounded = total + new
    part = rounded - total
    return rounded, lost + ((total - (rounded - part)) + (new - part))


def tap(block: Block) -> dict[str, jax.Array]:
    """Puts a listener before one projection of each input; the dict holds the inputs once the block was called."""
    seen: dict[str, jax.Array] = {}

    def listen(name: str, projection):
        def call(x, *args):
            seen[name] = x
            return projection(x, *args)

        return call

    for name, member in _TAPS.items():
        setattr(block, member, listen(name, getattr(block, member)))
    return seen


def _block_at(block_def: nnx.GraphDef, stack, index: jax.Array) -> tuple[Block, jax.Array | None]:
    """One layer of `Transformer.layer_stack`, and whether its window slides."""
    state, is_sliding = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stack)
    return nnx.merge(block_def, state), is_sliding


@functools.partial(jax.jit, static_argnums=0)
def _enter(graphdef, state, tokens, attention_mask, first) -> tuple[jax.Array, LayerContext]:
    """The residual stream before layer `first` (), and what the layers need beside it."""
    model = nnx.merge(graphdef, state)
    block_def, stack = model.layer_stack()
    x, context = model.enter(tokens, attention_mask)  # (B, T, D)

    def walk(index, x):
        block, is_sliding = _block_at(block_def, stack, index)
        return block(x, context.mask(is_sliding), context.cos, context.sin)

    return jax.lax.fori_loop(0, first, walk, x), context


@functools.partial(jax.jit, static_argnums=0, donate_argnames=("x", "moments"))
def observe_layer(block_def, stack, index, x, context, attention_mask, moments) -> tuple[jax.Array, Moments]:
    """x (B, T, D) after layer `index` (), and `moments` with the inputs of its projections added; both are given up."""
    block, is_sliding = _block_at(block_def, stack, index)
    seen = tap(block)
    x = block(x, context.mask(is_sliding), context.cos, context.sin)
    return x, _add(moments, seen, attention_mask)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="moments")
def _observe_head(norm_def, norm_state, x, attention_mask, moments) -> Moments:
    return _add(moments, {"head": nnx.merge(norm_def, norm_state)(x)}, attention_mask)


def _add(moments: Moments, seen: dict[str, jax.Array], attention_mask: jax.Array) -> Moments:
    pairs = {
        name: add_exactly(moments.total[name], moments.lost[name], product_sum(x, attention_mask))
        for name, x in seen.items()
    }
    return Moments(
        {name: total for name, (total, _) in pairs.items()}, {name: lost for name, (_, lost) in pairs.items()}
    )


def observe(model: Transformer, tokens: jax.Array, attention_mask: jax.Array, group: Group) -> Group:
    """Adds one batch to the sums of a group of layers.

    The programs are compiled once for a batch shape, whatever the group: layers before it are walked by one, each
    layer of it is observed by another. (One program for a whole group would copy its sums at every layer.)

    Args:
      tokens: (B, T) int32, as the model is to see them.
      attention_mask: (B, T) bool, False = padding, which neither is seen nor counts.
      group: from `zero_moments` or the call before; given up.
    """
    layers = [layer for layer in group if layer is not None]
    x, context = _enter(*nnx.split(model), tokens, attention_mask, np.int32(layers[0]))  # (B, T, D)
    block_def, stack = model.layer_stack()
    observed: Group = {}
    for layer in layers:
        x, observed[layer] = observe_layer(block_def, stack, np.int32(layer), x, context, attention_mask, group[layer])
    if None in group:
        observed[None] = _observe_head(*nnx.split(model.final_norm), x, attention_mask, group[None])
    return observed


def second_moments(moments: Moments, num_tokens: int) -> dict[str, np.ndarray]:
    """H (n, n) float32 of each input: the sum in float64 over the tokens, and exactly symmetric."""

    def mean(total: jax.Array, lost: jax.Array) -> np.ndarray:
        h = (whole(total).astype(np.float64) + whole(lost).astype(np.float64)) / num_tokens
        return ((h + h.T) / 2).astype(np.float32)

    return {name: mean(moments.total[name], moments.lost[name]) for name in moments.total}


def model_input(config: ModelConfig, key: jax.Array, tokens: jax.Array, is_response: jax.Array) -> jax.Array:
    """The tokens as the model sees them in use: causal models as they are, LLaDA and Dream masked as in training.

    Each row draws one share, and every token of its response is masked with that probability.
    """
    if config.family not in DIFFUSION_FAMILIES:
        return tokens
    if config.mask_id is None:
        raise ValueError(f"the config.json of this {config.family} model has no mask_token_id; add it.")
    is_safe = jnp.ones(tokens.shape[0], bool)  # so no target becomes [EOS], and which id that is does not matter
    noised = corrupt(key, tokens, is_response, is_safe, mask_id=config.mask_id, eos_id=config.mask_id)
    return noised.noisy_tokens


# -- the folder -------------------------------------------------------------------------------------------------------


def layer_file(layer: int | None) -> str:
    """Name of the file with a layer's H; None: the head's."""
    return "head.safetensors" if layer is None else f"layer_{layer:03d}.safetensors"


class Calibration:
    """A finished calibration folder; each H is read when it is asked for.

    Attributes:
      settings: what `calibration.json` holds.
      num_layers: of the model.

    Raises:
      ValueError: no such folder, an unfinished one, or one of a newer version.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        path = self.folder / CALIBRATION_NAME
        if not path.is_file():
            if not self.folder.is_dir():
                raise ValueError(f"no calibration folder {os.fspath(folder)!r}; make it with odlri_jax.calibrate.")
            raise ValueError(
                f"{self.folder} has no {CALIBRATION_NAME}: it is unfinished, or no calibration folder; run "
                "odlri_jax.calibrate with the same --out again."
            )
        self.settings = read_calibration_json(path)
        self.num_layers: int = self.settings["num_layers"]

    def check_head(self) -> None:
        """ValueError where the folder holds no H of the head."""
        if not (self.folder / layer_file(None)).is_file():
            raise ValueError(f"{self.folder} holds no H of the head; calibrate with --head into another folder.")

    def second_moment(self, projection: str, layer: int | None = None) -> np.ndarray:
        """H (n, n) float32 of the input of "q_proj", ..., "down_proj" in a layer, or of "lm_head" (layer None)."""
        if projection not in INPUT_OF:
            raise ValueError(f"no linear layer is called {projection!r}; known: {sorted(INPUT_OF)}.")
        name = INPUT_OF[projection]
        if name == "head":
            self.check_head()
            layer = None
        elif layer is None or not 0 <= layer < self.num_layers:
            raise ValueError(f"{projection} of layer {layer}: {self.folder} holds layers 0 to {self.num_layers - 1}.")
        path = self.folder / layer_file(layer)
        try:
            with safe_open(path, framework="np") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); it is damaged or absent: delete it, and run odlri_jax.calibrate "
                "with the same settings again, which makes it anew."
            ) from error


def read_calibration_json(path: Path) -> Mapping[str, Any]:
    """The settings of a folder, checked for format and version."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); calibrate again into another folder.") from error
    if settings.get("format") != FORMAT:
        raise ValueError(f"{path} has format {settings.get('format')!r}, not {FORMAT!r}; give a calibration folder.")
    if settings["version"] > VERSION:
        raise ValueError(f"{path} is of version {settings['version']}, this code reads up to {VERSION}; update it.")
    return settings
