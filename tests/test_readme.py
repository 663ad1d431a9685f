"""The Python in README.md runs as it stands there, one block after the other, on tiny models."""

import re
from pathlib import Path

import torch
from tiny import ROWS, make_model, make_tokenizer

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks() -> list[str]:
    """Python blocks of the README; of two versions of a line, the one that is ours."""
    return [
        re.sub(r"\A.*(?=# after)", "", block, flags=re.S) for block in re.findall(r"```python\n(.*?)```", README, re.S)
    ]


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, own_cache):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = make_model("llama"), make_tokenizer()
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    texts = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in ROWS]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    for i, row in enumerate(ROWS * 2):
        labels[i, : len(tokenizer(row["prompt"])["input_ids"])] = -100
    names = {"model": model, "input_ids": ids, "attention_mask": mask, "labels": labels, "pairs": ROWS}
    code = blocks()
    assert len(code) == 5 and sum(MODEL in block for block in code) == 1
    for block in code:
        exec(block.replace(MODEL, "base"), names)
    assert model.lm_head.weight.grad.abs().sum() > 0
    torch.testing.assert_close(names["loss"], names["out"].loss)
    assert names["trainer"].state.global_step == 3
    assert {"README.md", "model.safetensors"} <= {path.name for path in Path("out").iterdir()}
