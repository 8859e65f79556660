"""The Colab notebooks, run from end to end on settings that only show that every cell works."""

import json
import os
from pathlib import Path

import nbclient
import nbformat
import pytest
from tokenizer_folders import SENTENCES, write_llama2

import a2d_jax

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture
def run_notebook(monkeypatch):
    """`run_notebook(name, **parameters)`: what the notebook prints with other values of its parameters."""
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")

    def run(name: str, **parameters) -> str:
        notebook = nbformat.read(ROOT / "launch" / "colab" / name, as_version=4)
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
        (index,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
        assert all(key in notebook.cells[index].source for key in parameters)
        values = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(f"{values}\nOUT = pathlib.Path(OUT)"))
        place = {"metadata": {"path": str(ROOT)}}
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
        streams = (output for cell in notebook.cells for output in cell.get("outputs", ()))
        return "".join(output.get("text", "") for output in streams)

    return run


def test_the_small_world_is_aligned_and_attacked(run_notebook, tmp_path):
    text = run_notebook("align.ipynb", OUT=str(tmp_path), NUM_STEPS=3, LIMIT=2)
    assert "trained 3 steps" in text
    for name in ("prefilling", "dija", "fits"):
        assert f"{name:11} base " in text
    assert text.count("P([EOS]) at the first step") == 2
    assert (tmp_path / "a2d" / "checkpoints" / "3").is_dir()


def test_a_folder_is_compressed_and_answers(run_notebook, tmp_path):
    source = write_llama2(tmp_path)
    hf = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(hf | {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16})
    )
    a2d_jax.save_pretrained(a2d_jax.Transformer(a2d_jax.load_config(source)), source)
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES * 4))
    text = run_notebook(
        "compress.ipynb", OUT=str(tmp_path / "out"), SOURCE=str(source), TEXTS=[str(tmp_path / "text.txt")] * 2,
        CONTEXT_LENGTH=32, NUM_WINDOWS=2, NUM_TEST_WINDOWS=2, GEN_LENGTH=4,
        DECOMPOSE={"rank": 2, "init": "zero", "outer_iters": 1, "inner_iters": 1, "tune_iters": 0},
    )  # fmt: skip
    assert "dense   perplexity " in text and "packed  perplexity " in text
    assert text.count(" bits a weight") == 7
