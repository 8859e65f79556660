r"""The whole pipeline on LLaDA-8B: align with LoRA, attack, compress to 2 bits, attack again, export, report.

    python -m odlri_jax.pipeline --config configs/pipeline_llada_8b.py --out DIR --config.source=LLaDA-8B-Instruct \
        --config.judge=PACKAGE.MODULE:FUNCTION

The files are yours: `beavertails.jsonl` (rows with prompt, response, is_safe); HarmBench's requests, DIJA's templates
and FITS' texts as JSON lists, whose keys docs/baselines_and_judges.md names; XSTest's CSV as published. Keywords judge
until you name better ones; for over-refusal they are what XSTest's own string match does. HarmBench's classifier judges
with --config.judge=harmbench --config.judge_settings.checkpoint=DIR, and --config.mesh="(1,4,1)" takes four chips. None
of it has been run on a TPU yet.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """The paper's alignment and decoding; calibration on the safety rows, harmful and harmless, as they come."""
    return config_dict.ConfigDict(
        {
            "source": "llada",
            "align": "configs/llada_8b_a2d.py",
            "align_changes": ("data.files=('beavertails.jsonl',)",),
            "attacks": {
                "zero_shot": "harmbench.json",
                "prefilling": "harmbench.json",
                "dija": "harmbench_dija.json",
                "fits": "harmbench_fits.json",
            },
            "harmless": {"xstest": "xstest_prompts.csv"},
            "orders": ("confidence", "left_to_right", "random"),
            "judge": "keywords",
            "answer_judge": "keywords",
            "judge_settings": {"checkpoint": config_dict.placeholder(str)},
            "mesh": config_dict.placeholder(tuple),
            "sampler": {"gen_length": 128, "steps": 128, "block_length": 32},
            "calibration_rows": ("beavertails.jsonl",),
            "layers_per_group": 4,  # whose sums take 6.4 GB, split over the chips; all 32 layers' would take 51
            "calibration_dtype": "bfloat16",
            "decompose": {"rank": 64, "init": "auto"},
        }
    )
