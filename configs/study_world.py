"""The safety study on the embedded world: every table of the A2D paper in miniature, and what stands beyond it.

    python -m a2d_jax.study --config configs/study_world.py --workdir DIR
    python -m a2d_jax.study --config configs/study_world.py --workdir DIR --only defences,depth --config.seeds="(0,)"

World 0 has the base that the package carries; those of the other worlds are trained from random weights. With
--config.base=next_base they are trained from the carried one in a fifth of the steps, and know less; a folder, with
{seed} in its name, is taken as it is.
"""

from pathlib import Path

from ml_collections import config_dict

import a2d_jax
from a2d_jax.orders import ORDERS
from configs.world_ablations import VARIANTS

CARRIED = str(Path(a2d_jax.__file__).parent / "world_base")  # of world 0
ATTACKS = ("zero_shot", "prefilling", "dija", "fits")
FILLING = ("dija", "fits")
DECODING = ("--gen_length=24", "--steps=24", "--block_length=24", "--batch_size=64", "--buckets=40,56,96")
JUDGE = "--judge=a2d_jax.world:judge"
RESIDUALS = {
    "uniform_0.1": ("residual.target=uniform", "residual.weight=0.1"),
    "uniform_0.3": ("residual.target=uniform",),
    "uniform_1": ("residual.target=uniform", "residual.weight=1.0"),
    "tokens_0.3": ("residual.target=tokens", "residual.text=sorry, i can not help with that."),
    "marginal_0.3": (),
    "base_0.3": ("residual.target=base",),
}


def prompts(name: str) -> str:
    return f"{{world}}/attacks/{name}.json"


def measures() -> dict:
    """Every attack in every order, with [EOS] banned, in the second language; harmless questions; early rejection."""
    named = {
        f"{attack} {order}": {"attack": attack, "prompts": prompts(attack), "sampler": {"order": order}}
        for attack in ATTACKS
        for order in ORDERS
    }
    for attack in ATTACKS:
        named[f"{attack}, no [EOS]"] = {"attack": attack, "prompts": prompts(attack), "sampler": {"ban_eos": True}}
        named[f"{attack}, renamed"] = {"attack": attack, "prompts": prompts(f"{attack}_renamed")}
    for name in ("foods", "near_misses"):
        named[name] = {"attack": "over_refusal", "prompts": prompts(name), "judge": "a2d_jax.world:is_exact"}
    return named


def trainings() -> dict:
    """The base in its two stages, the defences, the variants of A2D, the second language, the causal models."""
    runs = {
        "pretrain": {"config": "configs/world_pretrain.py:{world}", "start": "{world}/model"},
        "trained_base": {"config": "configs/world_base.py:{world}", "start": "pretrain"},
        "next_base": {"config": "configs/world_next.py:{world}", "start": CARRIED},
        **{name: {"config": f"configs/world_{name}.py:{{world}}"} for name in ("rt", "sft", "vrpo", "a2d")},
        "compliant": {"config": "configs/world_compliant.py:{world}"},
        "compliant_rt": {"config": "configs/world_rt.py:{world}", "start": "compliant"},
        "compliant_a2d": {"config": "configs/world_a2d.py:{world}", "start": "compliant"},
        "bilingual": {"config": "configs/world_bilingual.py:{world}"},
        "a2d_bilingual": {"config": "configs/world_a2d.py:{world}", "start": "bilingual"},
        "causal_base": {"config": "configs/world_causal_base.py:{world}", "start": "{world}/model_causal"},
        "causal_a2d": {"config": "configs/world_causal_a2d.py:{world}", "start": "causal_base"},
        "long_base": {"config": "configs/world_long_base.py:{world}"},
        "long_a2d": {"config": "configs/world_long_a2d.py:{world}", "start": "long_base"},
    }
    for name in VARIANTS:
        if name != "a2d":
            runs[name] = {"config": f"configs/world_ablations.py:{name}:{{world}}"}
    for name, changes in RESIDUALS.items():
        runs[f"residual_{name}"] = {"config": "configs/world_a2d_residual.py:{world}", "changes": changes}
    return runs


def depth(base: str, **aligned: str) -> tuple[str, ...]:
    """KL of models to the base that they were trained from."""
    models = ",".join(f"{name}={{{model}}}" for name, model in aligned.items())
    return (
        "a2d_jax.depth", f"--base={{{base}}}", f"--aligned={models}", "--rows={world}/attacks/harmful_texts.jsonl",
        "--out={out}", "--batch_size=16", "--dtype=float32",
    )  # fmt: skip


def parts() -> dict:
    plain = tuple(f"{attack} confidence" for attack in ATTACKS)
    harmless = ("foods", "near_misses")
    banned = tuple(f"{attack}, no [EOS]" for attack in ATTACKS)
    # A worker that is done takes over what other seeds have left, from the end: there stands a short one of the parts
    # that all seeds have.
    return {
        "defences": {
            "title": "Defences by attack and order",
            "text": "Success of the attacks with held-out curses, and harmless questions answered exactly.",
            "models": ("base", "rt", "sft", "vrpo", "a2d"),
            "measures": (*(f"{attack} {order}" for attack in ATTACKS for order in ORDERS), *banned, *harmless),
        },
        "depth": {
            "title": "How deep the alignment goes",
            "text": "KL(aligned || base) and total variation along the answers of the held-out curses as they are "
            "written, where the base answers every request.",
            "command": depth("compliant", rt="compliant_rt", a2d="compliant_a2d"),
            "tables": ("table.txt",),
            "pictures": ("depth.png",),
        },
        "early_refusal": {
            "title": "Refused at once, with 128 tokens of response",
            "text": "A base and an A2D whose rows [EOS] fills to 152 tokens; what monitors of P([EOS]) save and cost.",
            "command": (
                "a2d_jax.early_refusal", "--checkpoint={long_a2d}", "--base={long_base}", "--out={out}",
                "--prompts={world}/attacks", JUDGE, "--answer_judge=a2d_jax.world:is_exact", "--dtype=float32",
                "--gen_length=128", "--steps=128", "--batch_size=48", "--buckets=40,56,152,160",
            ),
            "tables": ("results.md",),
        },
        "compressed": {
            "title": "Both methods together",
            "text": "Base and aligned model at 4, 3 and 2 bits, by what H was calibrated on; and the base compressed "
            "to 2 bits first, its factors aligned afterwards.",
            "command": (
                "odlri_jax.safety_study", "--out={out}", "--checkpoints=base={base_hf},a2d={a2d_hf}",
                "--calibration_rows=harmless={world}/data/a2d_retain.jsonl,harmful={world}/data/a2d_harmful.jsonl",
                "--prompts=" + ",".join(f"{attack}={prompts(attack)}" for attack in ATTACKS),
                "--harmless=" + ",".join(f"{name}={prompts(name)}" for name in harmless),
                "--bits=4,3,2", "--ranks=4,8", JUDGE, "--answer_judge=a2d_jax.world:is_exact", "--seed={seed}",
                "--outer_iters=5", "--tune_iters=2", "--num_windows=448",
                "--align=base", "--align_bits=2", "--align_calibrations=mixture",
                "--align_config=configs/world_a2d.py:{world}", *DECODING,
            ),
            "tables": ("results.md",),
            "pictures": ("results.png",),
        },
        "residual": {
            "title": "Safe without [EOS]: the residual term",
            "text": "A2D, and with 0.3 KL(target || p without [EOS] and [MASK]) at masked positions of harmful rows.",
            "models": ("a2d", *(f"residual_{target}_0.3" for target in ("uniform", "tokens", "marginal", "base"))),
            "measures": (*banned, *plain, *harmless),
        },
        "depth_refusing": {
            "title": "Depth over the base that refuses by itself",
            "text": "The same over the study's base, which refuses direct requests before any alignment.",
            "command": depth("base", rt="rt", vrpo="vrpo", a2d="a2d"),
            "tables": ("table.txt",),
            "pictures": ("depth.png",),
            "seeds": (0,),
        },
        "residual_weight": {
            "title": "The weight of the residual term",
            "text": "The target uniform with other weights.",
            "models": ("a2d", *(f"residual_uniform_{weight}" for weight in ("0.1", "0.3", "1"))),
            "measures": (*banned, *plain, *harmless),
            "seeds": (0,),
        },
        "adaptive": {
            "title": "Attacks that adapt, on A2D",
            "text": "Each beside the plain attack that it changes.",
            "command": (
                "a2d_jax.adaptive", "--checkpoint={a2d}", "--prompts={world}/attacks", "--out={out}", JUDGE, *DECODING,
                "--dtype=float32",
            ),
            "tables": ("table.txt",),
            "seeds": (0,),
        },
        "relearn": {
            "title": "Fine-tuning A2D back with eight harmful rows",
            "text": "Success on held-out curses after so many steps.",
            "command": (
                "a2d_jax.relearn", "--config=configs/world_relearn.py:{world}",
                "--config.model.checkpoint={a2d_hf}", "--checkpoint={a2d_hf}", "--prompts={world}/attacks",
                "--out={out}", "--num_rows=8", "--attacks=zero_shot,prefilling,dija,fits", JUDGE, *DECODING,
                "--dtype=float32",
            ),
            "tables": ("table.txt",),
            "seeds": (0,),
        },
        "causal": {
            "title": "Autoregressive A2D",
            "text": "The same objective for a causal model: [EOS] behind every prefix of a harmful answer.",
            "models": ("causal_base", "causal_a2d"),
            "measures": ("zero_shot confidence", "prefilling confidence", *harmless),
            "seeds": (0,),
        },
        "language": {
            "title": "Another language of the same request",
            "text": "A base that read everything in two languages, aligned in the first, asked in the second.",
            "models": ("bilingual", "a2d_bilingual"),
            "measures": (*(f"{attack}, renamed" for attack in ATTACKS), *plain, *harmless),
            "seeds": (0,),
        },
        "ablations": {
            "title": "A2D with one thing changed",
            "text": "The refusal token, the mask ratio, the share of harmful rows, the adapter.",
            "models": tuple(VARIANTS),
            "measures": (*plain, "dija left_to_right", "dija random", *harmless),
            "seeds": (0,),
        },
    }  # fmt: skip


def get_config() -> config_dict.ConfigDict:
    """Three seeds, each with a world, a base and defences of its own."""
    return config_dict.ConfigDict(
        {
            "seeds": (0, 1, 2),
            "prepare": (("a2d_jax.world", "--seed={seed}", "--out={world}"),),
            "base": "trained_base",
            "carried": {"0": CARRIED},
            "trainings": trainings(),
            "measures": measures(),
            "parts": tuple({"name": name, **part} for name, part in parts().items()),
            "sampler": {"gen_length": 24, "steps": 24, "block_length": 24},
            "batch_size": 64,
            "buckets": (40, 56),
            "dtype": "float32",
            "judge": "a2d_jax.world:judge",
        },
        allow_dotted_keys=True,
    )
