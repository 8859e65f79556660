"""Settings of a decomposition W ~ Q + L R, and the starts that they name."""

import dataclasses

from odlri_jax.codebooks import BLOCK, Codebook, get_codebook

INITS = ("zero", "svd", "svd_w", "odlri", "auto")


@dataclasses.dataclass(frozen=True)
class DecomposeConfig:
    """How to decompose.

    Attributes:
      rank: r; a multiple of 8 when the factors are quantised.
      num_outliers: k of the odlri start; no other start but auto reads it.
      init: a start of `initialize.py` ("zero", "svd", "svd_w", "odlri"), or "auto": the one (of zero, svd, and odlri
        with several k) whose first iterations end lowest.
      q_bits: bits a weight of Q.
      q_codebook: "e8p" (2, 3, 4 bits), "uniform" or "normal_float".
      group: columns that share a scale with the last two.
      lr_bits: 16 (float16), or 2, 3, 4 for factors on the lattice.
      outer_iters, inner_iters: alternations, and rounds of LPLR within each, which 16-bit factors do not take.
      tune_iters: sweeps after each rounding of Q.
      hadamard: rotate W and H first.
      ridge: added to H, as a share of its mean diagonal.
      published: the published algorithm step by step.
    """

    rank: int = 64
    num_outliers: int = 8
    init: str = "auto"
    q_bits: int = 2
    q_codebook: str = "e8p"
    group: int = 64
    lr_bits: int = 16
    outer_iters: int = 15
    inner_iters: int = 10
    tune_iters: int = 10
    hadamard: bool = True
    ridge: float = 1e-2
    published: bool = False

    def __post_init__(self):
        if self.init not in INITS:
            raise ValueError(f"init={self.init!r} is unknown; it is one of {', '.join(INITS)}.")
        if self.lr_bits not in (2, 3, 4, 16):
            raise ValueError(f"lr_bits={self.lr_bits}: factors have 16 bits, or 4, 3 or 2 on the lattice.")
        if self.lr_bits < 16 and self.rank % BLOCK:
            raise ValueError(
                f"rank={self.rank} with lr_bits={self.lr_bits}: lattice factors need a multiple of {BLOCK}."
            )
        least = {
            "rank": 1,
            "num_outliers": 1 if self.init in ("odlri", "auto") else 0,  # of the odlri start alone
            "outer_iters": 1,
            "inner_iters": 1 if self.lr_bits < 16 else 0,  # of quantised factors alone
            "tune_iters": 0,
        }
        for name, bound in least.items():
            if (value := getattr(self, name)) < bound:
                raise ValueError(f"{name}={value} must be at least {bound}.")
        if self.group < 1:
            raise ValueError(f"group={self.group}: so many columns share a scale; give a multiple of {BLOCK}.")
        if self.ridge < 0:
            raise ValueError(f"ridge={self.ridge} is taken from H, not added to it; give 0 or more.")
        get_codebook(self.q_codebook, self.q_bits)

    @property
    def codebook(self) -> Codebook:
        return get_codebook(self.q_codebook, self.q_bits)

    @property
    def factor_codebook(self) -> Codebook | None:
        return None if self.lr_bits == 16 else get_codebook("e8p", self.lr_bits)

    @property
    def rotates_factors(self) -> bool:
        """Whether L and R live in the rotated basis."""
        return self.hadamard or (self.lr_bits < 16 and not self.published)


def starts(config: DecomposeConfig) -> list[tuple[str, int]]:
    """Starts that `config` tries, each with its k."""
    if config.init != "auto":
        return [(config.init, config.num_outliers if config.init == "odlri" else 0)]
    ks = sorted({config.num_outliers, config.rank})
    return [("zero", 0), ("svd", 0)] + [("odlri", k) for k in ks]
