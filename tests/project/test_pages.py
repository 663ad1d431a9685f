"""The pages: README and docs run as they stand there, stay short, and link to what is there."""

import re
import shlex
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import ROWS, make_model, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
PAGES += [ROOT / "benchmarks/README.md", ROOT / "examples/README.md"]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: Path) -> list[str]:
    """Python blocks of a page; of two versions of a line, the one that is ours."""
    found = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    return [re.sub(r"\A.*(?=# after)", "", block, flags=re.S) for block in found]


@contextmanager
def one_rank(folder):
    """A process group of this process alone, for what a page does on several."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def test_the_python_of_the_pages_runs(tmp_path, monkeypatch, own_cache):
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
    code = [block for page in PAGES for block in blocks(page)]
    assert len(blocks(README)) == 4 and len(code) == 10 and sum(MODEL in block for block in code) == 1
    for block in code:
        if "torch.cuda" in block and not torch.cuda.is_available():
            # At least it is Python.
            compile(block, "a page", "exec")
            continue
        with one_rank(tmp_path) if "_group" in block else nullcontext() as group:
            names |= {"tp_group": group, "cp_group": group}
            exec(block.replace(MODEL, "base"), names)
    assert names["cut_loss"].isfinite()
    torch.testing.assert_close(names["slice_loss"], names["cut_loss"])
    assert model.lm_head.weight.grad.abs().sum() > 0
    torch.testing.assert_close(names["loss"], names["out"].loss)
    assert names["trainer"].state.global_step == 3
    assert {"README.md", "model.safetensors"} <= {path.name for path in Path("out").iterdir()}


def test_the_readme_is_one_screen():
    assert len(README.read_text().split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_no_commit(page):
    numbers = re.findall(r"\b(?=\w*\d)(?=\w*[a-f])[0-9a-f]{7,40}\b", page.read_text())
    assert not numbers


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_every_page_is_reached_from_the_readme():
    seen, ahead = set(), [README]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        links = ((page.parent / link.partition("#")[0]).resolve() for link in LINK.findall(page.read_text()))
        ahead += [link for link in links if link in PAGES and link not in seen]
    assert seen == set(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_read_as_they_stand(page, tmp_path, monkeypatch):
    from orpo.cli.arguments import parse

    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("beta: 0.2\n")
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["orpo-train"] and len(words) > 2 and not words[1].startswith("--print"):
                parse(words[1:])
