"""orpo/report/page.py: what stands in report.html, that it needs nothing else, and that a browser shows it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from tiny import ROWS, SEVEN
from trainers import make_trainer

from orpo.report.curves import plot_curves
from orpo.report.glossary import METRICS, SYMBOLS, explained
from orpo.report.page import read_samples, write_page

DOCS = Path(__file__).resolve().parents[2] / "docs"
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Texts by tag, and the addresses that are loaded; raises where tags are not closed in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.texts, self.loaded, self.links = [], [], [], []
        self.feed(path.read_text("utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("img", "script", "link"):
            self.loaded.append(attrs.get("src") or attrs.get("href"))
        if tag == "a":
            self.links.append(attrs["href"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], " ".join(data.split())))

    def of(self, tag):
        return [text for at, text in self.texts if at == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a run & its <page>")
    data = [*ROWS, {"prompt": "hello", "chosen": "", "rejected": ""}]
    trainer = make_trainer(folder, train_dataset=data, eval_dataset=SEVEN, eval_strategy="steps", eval_steps=1)
    trainer.train()
    plot_curves({"ORPO": trainer.state.log_history}, folder / "curves.png")
    lines = [
        {"step": step, "prompt": prompt, "answer": f"{answer} at {step}", "chosen": "c"}
        for step in (1, 2)
        for prompt, answer in (("<script>alert('x')</script>", "a\u2028b"), ("plain", "\n  indented"))
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_page(trainer, folder, described="A <model>, trained.", samples=folder / "samples.jsonl")
    return folder, trainer


def test_the_page_holds_what_was_run_and_loads_nothing(folder):
    folder, trainer = folder
    page = Page(folder / "report.html")
    assert all(address.startswith("data:") for address in page.loaded) and len(page.loaded) == 2
    assert page.links == ["README.md", "curves.csv"]
    assert page.of("h1") == [folder.name] and "A <model>, trained." in page.of("p")
    assert page.of("li")[0].startswith("train: kept 7 of 8: 1 empty")
    numbers, names = page.of("td"), page.of("code")
    first, last = (e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e)
    place = numbers.index(f"{first:.4g}")
    assert numbers[place + 1] == f"{last:.4g}" and {"loss", "rewards/accuracies", "learning_rate"} <= set(names)
    # The three to watch come first.
    assert names[:3] == ["rewards/accuracies", "a_w > a_l", "rewards/margins"]
    assert any(
        "8 pairs" not in text and "learning rate 0.001; 2 steps were taken; beta 0.1" in text for text in page.of("p")
    )
    assert "0.001" in numbers and "script" not in [tag for tag, _ in page.texts]
    assert "<script>alert('x')</script>" in numbers and any("at 1" in text for text in numbers)
    assert "mean of" in " ".join(numbers) and page.of("pre")[0].startswith("orpo-generate '")


def test_answers_are_shown_from_the_first_and_the_last_evaluation(folder):
    rows = read_samples(folder[0] / "samples.jsonl")
    assert [(row["before"], row["after"], row["after_step"]) for row in rows] == [
        ("a\u2028b at 1", "a\u2028b at 2", 2),
        ("\n  indented at 1", "\n  indented at 2", 2),
    ]


def test_a_run_without_evaluation_logs_or_samples_says_so(tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=50, learning_rate=1e-6)
    trainer.train()
    write_page(trainer, tmp_path, described="A model.")
    text, page = (tmp_path / "report.html").read_text(), Page(tmp_path / "report.html")
    assert page.loaded == ["data:,"] and page.links == ["README.md"]
    assert "Nothing was evaluated" in text and "Nothing was logged" in text and "Answers to" not in text


def test_the_words_for_metrics_are_those_of_the_page_on_metrics():
    page = (DOCS / "metrics.md").read_text()
    rows = [f"| {', '.join(f'`{name}`' for name in names)} | {what} | {goes} |" for names, what, goes in METRICS]
    found = [line for line in page.splitlines() if line.startswith("| `")]
    # The last row is of transformers' own.
    assert found[:-1] == rows and found[-1].startswith("| `grad_norm`")
    assert " ".join(SYMBOLS.split()) in " ".join(page.split())


@pytest.mark.parametrize(
    ("name", "begins"),
    [("loss", "`nll_weight"), ("nll_loss", "mean negative"), ("pairs_nll_loss", "mean negative"), ("mine", "")],
)
def test_a_metric_is_explained_by_its_whole_name(name, begins):
    what, _ = explained(name)
    assert what.startswith(begins) and bool(what) == bool(begins)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="looks at the page with chromium, which is not installed")
def test_a_browser_shows_the_page(folder, tmp_path):
    def look(path):
        line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        line += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,2400", "--hide-scrollbars"]
        shot = tmp_path / f"{path.stem}.png"
        done = subprocess.run(
            [*line, f"--screenshot={shot}", path.as_uri()], capture_output=True, text=True, timeout=120
        )
        return imread(shot), [said for said in done.stderr.splitlines() if "CONSOLE" in said]

    pixels, errors = look(folder[0] / "report.html")
    assert errors == []
    assert pixels.shape[:2] == (2400, 1000)
    # Text from the top to the bottom, and the orange of the curves.
    ink = pixels[..., :3].mean(-1) < 0.5
    assert all(part.any() for part in np.array_split(ink, 6))
    assert (np.abs(pixels[..., :3] - (0xD5 / 255, 0x5E / 255, 0)).max(-1) < 0.05).sum() > 50
    broken = tmp_path / "broken.html"
    broken.write_text(re.sub("</body>", "<script>nothing()</script></body>", (folder[0] / "report.html").read_text()))
    assert look(broken)[1]
