"""Draws the pictures from the stored results and writes the tables of README.md beside this file.

python -m benchmarks.paper.report
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.tables import table

from . import equations
from .pictures import draw_curves, title_of
from .train import RESULTS, RUNS, load

PAGE = Path(__file__).parent / "README.md"
SERIES = {"demo": "demonstration", "smollm2": "SmolLM2-135M"}
COLUMNS = ("accuracy", "margin", "chosen", "rejected", "gain_accuracy", "nll")
PICTURES = {"figure3.png": ["sft", "orpo:1.0"], "figure9.png": ["orpo:0.1", "orpo:0.5", "orpo:1.0"]}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Lowest and highest."""
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def runs_table(records: list[dict]) -> str:
    """The last held-out point of every run, lowest and highest over its seeds."""
    if not records:
        return "Not run."
    first, seeds = records[0], len({r["seed"] for r in records})
    sizes = (
        "{train:,} training pairs, {heldout} held-out pairs, {settings[steps]} steps of {settings[batch_size]} pairs, "
        "learning rate {settings[learning_rate]:g}, {settings[dtype]}, {seeds} seed{s}; torch {stamp[torch]}."
    ).format(**first, seeds=seeds, s="s" * (seeds > 1))
    start = [r["curve"][0] for r in {r["seed"]: r for r in records}.values()]
    found = [("start", start)] + [(title_of(run), [r["curve"][-1] for r in records if r["run"] == run]) for run in RUNS]
    rows = []
    for name, points in found:
        cells = [spread([p[c] for p in points]) if points else "" for c in COLUMNS]
        if name == "start":
            cells[COLUMNS.index("gain_accuracy")] = ""
        rows.append([name, str(len(points) or "not run"), *cells])
    header = ["run", "seeds", "accuracy", "margin", "chosen", "rejected", "accuracy of the gain", "NLL"]
    return f"{sizes}\n\n{table(header, rows)}"


def costs_table(folder: Path) -> str:
    """Forward passes, time and memory of a step for every model that was measured."""
    rows, stamps = [], []
    for path in sorted(folder.glob("costs-*.json")):
        record = json.loads(path.read_text())
        stamps.append("{pairs} pairs on {stamp[device]}, {stamp[threads]} thread(s)".format(**record))
        base = record["kinds"]["orpo"]["least"]
        for kind, f in record["kinds"].items():
            times = f"{1e3 * f['median']:.0f}", f"{1e3 * f['least']:.0f}", f"{f['least'] / base:.2f}"
            memory = f"{f['weights MiB']:.1f}", f"{f['working MiB']:.1f}"
            rows.append([record["model"], kind, str(f["forward passes"]), *times, *memory])
    header = ["model", "step", "forward passes", "median, ms", "least, ms", "least, times ORPO's", "weights, MiB"]
    return "\n".join([table([*header, "working memory, MiB"], rows), "", *dict.fromkeys(stamps)])


def ratios_table(folder: Path) -> str:
    """Spread of both ratios, from ``ratios.json``."""
    path = folder / "ratios.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    rows = [[name, *(f"{v:.2f}" for v in (f["standard deviation"], *f["quantiles"]))] for name, f in found.items()]
    return table(["", "standard deviation", "5 %", "25 %", "median", "75 %", "95 %"], rows)


def of_one_plan(name: str, folder: Path) -> list[dict]:
    """The finished runs of a series.

    Raises:
        ValueError: they are of several plans, of which there is no common spread over seeds.
    """
    records = load(name, folder)
    if any(r["settings"] != records[0]["settings"] for r in records):
        raise ValueError(f"{folder / name}.jsonl holds runs with different settings; keep one plan's in a file")
    return records


def sections(folder: Path = RESULTS) -> dict[str, str]:
    """Name of a marked section -> its text."""
    return {
        "equations": equations.table(equations.run()),
        "ratios": ratios_table(folder),
        "costs": costs_table(folder),
        **{name: runs_table(of_one_plan(name, folder)) for name in SERIES},
    }


def with_blocks(page: str, written: Mapping[str, str]) -> str:
    """The page with its blocks replaced.

    Raises:
        ValueError: it lacks the marks of one.
    """
    for name, text in written.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin not in page or end not in page:
            raise ValueError(f"the page lacks {begin} or {end}")
        whole = f"{begin}\n{text}\n{end}"
        page = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, whole=whole: whole, page, flags=re.S)
    return page


def main(folder: Path = RESULTS) -> None:
    series = {title: of_one_plan(name, folder) for name, title in SERIES.items()}
    for name, runs in PICTURES.items():
        print(draw_curves(series, runs, folder / name))
    PAGE.write_text(with_blocks(PAGE.read_text(), sections(folder)))
    print(PAGE)


if __name__ == "__main__":
    main()
