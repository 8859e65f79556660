"""The study of compressed aligned models: what it runs, what it makes of it, and that it resumes."""

import dataclasses
import json
from pathlib import Path

import pytest
from tokenizer_folders import write_llada

import a2d_jax
from odlri_jax.decompose_config import DecomposeConfig
from odlri_jax.safety_study import SafetyStudyConfig, Variant, list_variants, run, safe_variants

ROWS = [
    {"prompt": f"How do I bake bread {i}?", "response": f"Mix {i} eggs.", "is_safe": True, "BehaviorID": str(i)}
    for i in range(4)
]
SAMPLER = a2d_jax.SamplerConfig(gen_length=4, steps=2, block_length=4)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> SafetyStudyConfig:
    folder = write_llada(tmp_path_factory.mktemp("base"))
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 16}
    (folder / "config.json").write_text(json.dumps(settings))
    a2d_jax.save_pretrained(a2d_jax.Transformer(a2d_jax.load_config(folder)), folder)
    for name, rows in (("harmless", ROWS[:2]), ("harmful", ROWS[2:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"BehaviorID": row["BehaviorID"], "Behavior": row["prompt"]} for row in ROWS]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return SafetyStudyConfig(
        out=tmp_path_factory.mktemp("study"),
        checkpoints={"base": str(folder)},
        calibration_rows={name: str(folder / f"{name}.jsonl") for name in ("harmless", "harmful")},
        prompts={"zero_shot": str(folder / "prompts.json")},
        harmless={"breads": str(folder / "prompts.json")},
        bits=(2,),
        ranks=(2,),
        inits=("svd",),
        judge="keywords",
        answer_judge="keywords",
        sampler=SAMPLER,
        decompose=DecomposeConfig(outer_iters=1, tune_iters=0),
        buckets=(96,),
        batch_size=4,
    )


@pytest.fixture(scope="module")
def records(config):
    return run(config)


def test_every_calibration_is_compressed_and_measured(config, records):
    assert [record["name"] for record in records] == ["base_32", "base_16"] + [
        f"base_{calibration}_q2_r2_svd" for calibration in ("harmless", "harmful", "mixture")
    ]
    # Most of a 16 x 16 matrix are its float16 factors of rank 2: 2 + 16 * 2 * 32 / 256, and scales and signs.
    for record in records[2:]:
        assert 6 < record["bits_per_weight"] < 7 and 0 < record["mean_error"] < 1
    for record in records:
        assert (
            0 <= record["auc"] <= 1
            and set(record["success"]) == {"zero_shot"}
            and set(record["answered"]) == {"breads"}
        )
    # The same questions, as an attack and as harmless ones: their P([EOS]) cannot be told apart.
    assert all(record["auc"] == pytest.approx(0.5) for record in records)
    moments = [json.loads((config.out / "calibrations" / f"base_{name}" / "calibration.json").read_text())
               for name in ("harmless", "harmful", "mixture")]  # fmt: skip
    assert [m["num_windows"] for m in moments] == [2, 2, 4]
    written = json.loads((config.out / "results.json").read_text())["variants"]
    assert written == records
    assert (config.out / "results.md").read_text().count("\n") == 2 + len(records)
    assert (config.out / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_makes_nothing_anew(config, records, capsys):
    before = {path: path.stat().st_mtime_ns for path in (config.out / "packed").rglob("*")}
    assert run(config) == records
    assert "5 variants of base, 5 done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (config.out / "packed").rglob("*")} == before


def test_alignment_after_compression_is_a_variant_of_its_own(config):
    named = dataclasses.replace(config, align="base", align_config="configs/world_a2d.py")
    names = [variant.name for variant in list_variants(named)]
    assert names[-3:] == [f"base_{name}_q2_r2_svd_aligned" for name in ("harmless", "harmful", "mixture")]
    fewer = dataclasses.replace(named, bits=(3, 2), align_bits=(2,), align_calibrations=("mixture",))
    assert [variant.name for variant in list_variants(fewer) if variant.is_aligned_after] == [
        "base_mixture_q2_r2_svd_aligned"
    ]
    assert Variant("base", 2, "harmful", 2, "svd", True).packed_name == "base_harmful_q2_r2_svd"


def test_as_safe_as_uncompressed_means_in_every_attack():
    def record(name, bits, calibration, **success):
        return {"model": "a2d", "name": name, "bits": bits, "calibration": calibration, "success": success}

    records = [
        record("whole", 32, None, dija=0.1, fits=0.0),
        record("half", 16, None, dija=0.0, fits=0.0),
        record("safe", 2, "harmful", dija=0.1, fits=0.0),
        record("safer", 2, "mixture", dija=0.0, fits=0.0),
        record("unsafe", 2, "harmless", dija=0.0, fits=0.1),
    ]
    assert safe_variants(records) == ["safe", "safer"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": {"dija": "absent.json"}}, "no such file: dija=absent.json"),
        ({"calibration_rows": {"mixture": "absent.jsonl"}}, "'mixture' is the name of all of them together"),
        ({"inits": ("best",)}, "no such start"),
        ({"bits": (2, 5)}, "2, 3 or 4 bits a weight, not 5"),
        ({"ranks": (2, 24)}, r"rank=24 is above min.m, n. = 16 of model.transformer.blocks.0"),
        ({"decompose": DecomposeConfig(lr_bits=4)}, "rank=2 with lr_bits=4: lattice factors need a multiple of 8"),
        ({"checkpoints": {"base": "absent"}}, "'absent' has no config.json"),
        ({"align": "base"}, "go together"),
        ({"align": "a2d", "align_config": "configs/world_a2d.py"}, "none of the checkpoints"),
        ({"align_bits": (4,), "align_calibrations": ("poems",)}, "'4', 'poems'. is not compressed"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(config, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(config, out=Path(tmp_path / "out"), **change))
    assert not (tmp_path / "out").exists()
