"""The settings of decoding."""

import dataclasses

from a2d_jax import orders
from a2d_jax.config import DIFFUSION_FAMILIES
from a2d_jax.monitor import Monitor, as_plain_numbers, first_step

CACHES = ("prefix", "dual")
DREAM_ORDERS = {"origin": "random", "maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How to decode.

    Attributes:
      gen_length: masks that `generate` appends to the prompt.
      steps: forward passes at most; for `infill` as many as there are masks suffice (one token a step).
      block_length: `generate` finishes one block of the response before the next; None: blocks of 32 for LLaDA, one
        block for Dream. A block longer than the response is the whole response.
      order: "confidence" (LLaDA's low_confidence, Dream's maskgit_plus), "margin" (topk_margin), "entropy",
        "left_to_right", "right_to_left", "random" (Dream's origin).
      temperature: 0 takes the most likely token.
      cfg_scale: classifier-free guidance, logits = uncond + (cfg_scale + 1)(cond - uncond); uncond sees no prompt.
      reject_above: a row whose P([EOS]) at the first step is above this is refused: its masks become [EOS]. Short for
        `monitor=first_step(reject_above)`.
      monitor: another monitor that stops rows, see `a2d_jax/monitor.py`.
      cache: None recomputes everything at every step. "prefix" and "dual" are Fast-dLLM's approximations: keys and
        values are kept from the first pass of each block, and later passes recompute what comes after ("prefix": from
        the block's start to the end) or the block alone ("dual"). A Dream model's first pass of a block reveals one
        token, so a schedule needs two steps a block.
      threshold: a step reveals every position whose token is at least so probable, and the first of the order in any
        case; the order's schedule plays no part. (Dream without a cache: no more than its even share of `steps` so far,
        as in Fast-dLLM; steps equal to the number of blocks lifts this.)
      factor: a step reveals the n most probable tokens, the largest n with
        (n + 1)(1 - probability of the n-th) < factor.
      stop_after_eos: a row whose finished block ends in [EOS] is done, its tail is [EOS]. Changes the tail only: what
        would have been written there is not.
      top_p, top_k: only the most likely tokens of a position count; under the "dream" method, and for causal models at
        a temperature. With the "llada" method decoding refuses them.
      order_temperature: noise in the order of the positions (Dream's alg_temp), under both methods.
      eps: last point of Dream's time grid.
      method: "llada" or "dream" rules, see `a2d_jax/orders.py`; None: those of the model's family, where A2D's orders
        left_to_right and right_to_left have LLaDA's even schedule on every model.
      ban_eos: [EOS], and the model's refusal token where that is another, is never chosen, as in the released attack
        evaluation; it still counts in the confidence, but not in what top_p and top_k leave.
      ban_eot: the end of turn is never chosen either; needs `eot_id`.
      logits_eos_inf: [EOS] is removed from choice and confidence (LLaDA's flag).
      confidence_eos_eot_inf: [EOS] and end of turn are revealed last (LLaDA's flag); needs `eot_id`.
      count_prompt_masks: False replays LLaDA's quota, which leaves masks in the answer when the prompt holds masks.
    """

    gen_length: int = 128
    steps: int = 128
    block_length: int | None = None
    order: str = "confidence"
    temperature: float = 0.0
    cfg_scale: float = 0.0
    reject_above: float | None = None
    monitor: Monitor | None = None
    cache: str | None = None
    threshold: float | None = None
    factor: float | None = None
    stop_after_eos: bool = False
    top_p: float | None = None
    top_k: int | None = None
    order_temperature: float = 0.0
    eps: float = 1e-3
    method: str | None = None
    ban_eos: bool = False
    ban_eot: bool = False
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    eot_id: int | None = None
    count_prompt_masks: bool = True

    def __post_init__(self):
        as_plain_numbers(self)
        if self.order not in orders.ORDERS:
            raise ValueError(f"order={self.order!r}; choose one of {orders.ORDERS} (Dream's names: {DREAM_ORDERS}).")
        if self.method not in (None, *orders.METHODS):
            raise ValueError(f"method={self.method!r}; choose one of {orders.METHODS} or None.")
        if self.steps < 1 or self.gen_length < 1:
            raise ValueError(f"steps={self.steps}, gen_length={self.gen_length}; both must be at least 1.")
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"block_length={self.block_length}; give 1 or more, or None: by the model.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}; give 1 or more, or None: every token.")
        if self.temperature < 0 or self.order_temperature < 0:
            raise ValueError(f"temperature={self.temperature}, order_temperature={self.order_temperature}; give >= 0.")
        if self.cache not in (None, *CACHES):
            raise ValueError(f"cache={self.cache!r}; choose one of {CACHES} or None.")
        if self.threshold is not None and self.factor is not None:
            raise ValueError(f"threshold={self.threshold} and factor={self.factor}: give one of them, or none.")
        if self.factor is not None and self.factor <= 0:
            raise ValueError(f"factor={self.factor}; give > 0.")
        if self.reject_above is not None and self.monitor is not None:
            raise ValueError(f"reject_above={self.reject_above} is a monitor too; give it or monitor={self.monitor}.")
        for name in ("confidence_eos_eot_inf", "ban_eot"):
            if getattr(self, name) and self.eot_id is None:
                raise ValueError(f"{name} needs eot_id, the tokenizer's end-of-turn id.")

    def resolve(self, family: str) -> "SamplerConfig":
        """The same settings with what depends on the model's family filled in; ValueError where it cannot truncate."""
        has_dream_order = self.order in DREAM_ORDERS.values()
        method = self.method or ("dream" if family != "llada" and has_dream_order else "llada")
        if self.is_truncated and method == "llada" and family in DIFFUSION_FAMILIES:
            raise ValueError(
                f"top_p={self.top_p}, top_k={self.top_k} do nothing on a {family} model with order={self.order!r}, "
                f"method={self.method!r}: the llada method draws from all tokens; use method='dream'."
            )
        monitor = self.monitor if self.reject_above is None else first_step(self.reject_above)
        return dataclasses.replace(self, method=method, reject_above=None, monitor=monitor)

    @property
    def is_adaptive(self) -> bool:
        """Whether the model's confidence, not a schedule, says how many positions a step reveals."""
        return self.threshold is not None or self.factor is not None

    @property
    def is_truncated(self) -> bool:
        """Whether only the most likely tokens of a position count, under the "dream" method."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)

    @property
    def needs_key(self) -> bool:
        """Whether anything is drawn at random."""
        return self.temperature > 0 or self.order == "random" or self.order_temperature > 0

    def num_blocks(self, family: str) -> int:
        """Blocks of the response; ValueError where lengths or steps do not divide, or a cache has too few steps."""
        block = self.block_length or (32 if family == "llada" else self.gen_length)
        block = min(block, self.gen_length)
        if self.gen_length % block:
            whole = max(self.gen_length // block, 1) * block
            raise ValueError(
                f"gen_length={self.gen_length} is not a multiple of block_length={block}; "
                f"use gen_length={whole} or a block_length that divides {self.gen_length}."
            )
        blocks = self.gen_length // block
        if self.steps % blocks:
            raise ValueError(
                f"steps={self.steps} cannot be shared by {blocks} blocks (gen_length={self.gen_length} / "
                f"block_length={block}); use a multiple of {blocks}, such as {-(-self.steps // blocks) * blocks}."
            )
        if family == "dream" and self.cache is not None and not self.is_adaptive and blocks == self.steps and block > 1:
            raise ValueError(
                f"steps={self.steps} is one pass for each of {blocks} blocks, and with cache={self.cache!r} a Dream "
                f"model's first pass of a block reveals one token; use steps={2 * blocks} or more, or a threshold."
            )
        return blocks
