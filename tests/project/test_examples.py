"""The examples run as they stand, with a tiny model, and teach it something; with a real one they would do the same."""

import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from orpo.demo.data import make_pairs, write_jsonl
from orpo.train import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs an example with options, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *words])
        # The trainer asks for an accelerator, and tests are of the CPU.
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def test_strings_and_a_lora_on_what_they_leave(run, capsys, tmp_path):
    run("strings.py", "--max_steps", "30")
    said = capsys.readouterr().out
    accuracy = float(re.search(r"held-out pairs: ([\d.]+) ranked right", said)[1])
    # Two neighbouring manners of an answer: half is chance, over 50 pairs.
    assert accuracy > 0.5
    assert (tmp_path / "strings-out/model.safetensors").is_file()
    # The folder is a model like any other: the argument for a real one takes it, and so does the file of settings.
    run("strings.py", "--model", "strings-out", "--max_steps", "2", "--output_dir", "again")
    assert (tmp_path / "again/model.safetensors").is_file()
    # As `python -m orpo.demo.data --output demo-data` does, with fewer pairs.
    (tmp_path / "demo-data").mkdir()
    for name, rows in zip(("train", "heldout"), make_pairs(questions=20, held_out=4), strict=True):
        write_jsonl(rows, tmp_path / f"demo-data/{name}.jsonl")
    main(
        [
            "--config",
            str(EXAMPLES / "lora.yaml"),
            "--model_name_or_path",
            "strings-out",
            "--max_steps",
            "2",
            "--use_cpu",
        ]
    )
    assert (tmp_path / "lora-out/adapter_model.safetensors").is_file()
    assert (tmp_path / "lora-out/merged/model.safetensors").is_file()


def test_conversations(run, capsys, tmp_path):
    run("conversations.py")
    said = capsys.readouterr().out
    # What it was trained on for 40 steps it says by heart.
    assert said.splitlines()[-1] == "Can you lend me a pen? Of course, here it is!"
    run("conversations.py", "--model", "conversations-out", "--max_steps", "1", "--output_dir", "again")
    assert (tmp_path / "again/model.safetensors").is_file()


def test_an_own_loop(run, capsys):
    run("own_loop.py")
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 5 and losses[-1] < losses[0] - 1
    run("strings.py", "--max_steps", "1", "--output_dir", "model")
    run("own_loop.py", "--model", "model", "--max_steps", "1")
    assert "step 1: loss" in capsys.readouterr().out


def test_every_example_has_its_row_and_its_real_model():
    page = (EXAMPLES / "README.md").read_text()
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml", ".ipynb")}
    assert files == set(re.findall(r"^\| \[([\w.]+)\]", page, re.M))
    for name in files:
        text = (EXAMPLES / name).read_text()
        if name.endswith(".py"):
            assert f"python examples/{name} --model HuggingFaceTB/SmolLM2-135M" in text
    assert yaml.safe_load((EXAMPLES / "lora.yaml").read_text())["model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M"


def test_the_notebook_is_stored_without_results():
    cells = json.loads((EXAMPLES / "odds_ratio.ipynb").read_text())["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch, tmp_path):
    """Its cells hold their own checks, in float64, of the gradient and of the loss against the library's."""
    nbclient = pytest.importorskip("nbclient", reason="runs the notebook with nbclient, which is not installed")
    pytest.importorskip("ipykernel", reason="runs the notebook with ipykernel, which is not installed")
    import nbformat

    root = str(EXAMPLES.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, f"{root}/kernels", os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(EXAMPLES / "odds_ratio.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    words = "".join(out.get("text", "") for out in outputs)
    assert len(pictures) == 5 and "odds ratio 2.6667, loss 0.3185" in words
