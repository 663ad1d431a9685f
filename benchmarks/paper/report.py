"""Draws the pictures from the stored results and writes the tables of README.md beside this file.

python -m benchmarks.paper.report
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from . import equations
from .pictures import draw_curves, title_of
from .train import RESULTS, RUNS, load

PAGE = Path(__file__).parent / "README.md"
SERIES = {"demo": "demonstration", "smollm2": "SmolLM2-135M"}
COLUMNS = ("accuracy", "margin", "chosen", "rejected", "gain_accuracy", "nll")
PICTURES = {"figure3.png": ["sft", "orpo:1.0"], "figure9.png": ["orpo:0.1", "orpo:0.5", "orpo:1.0"]}


def _spread(values: list[float]) -> str:
    low, high = (f"{v:.2f}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def runs_table(records: list[dict]) -> str:
    """The last held-out point of every run, lowest and highest over its seeds."""
    if not records:
        return "Not run."
    first = records[0]
    settings = first["settings"]
    seeds = len({r["seed"] for r in records})
    sizes = (
        f"{first['train']:,} training pairs, {first['heldout']} held-out pairs, {settings['steps']} steps of "
        f"{settings['batch_size']} pairs, learning rate {settings['learning_rate']:g}, {settings['dtype']}"
    )
    lines = [
        f"{sizes}, {seeds} seed{'s' if seeds > 1 else ''}; torch {first['stamp']['torch']}.",
        "",
        "| run | seeds | accuracy | margin | chosen | rejected | accuracy of the gain | NLL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    start = [r["curve"][0] for r in {r["seed"]: r for r in records}.values()]
    rows = [("start", start)] + [(title_of(run), [r["curve"][-1] for r in records if r["run"] == run]) for run in RUNS]
    for name, points in rows:
        if points:
            cells = [_spread([p[c] for p in points]) for c in COLUMNS]
            if name == "start":
                cells[COLUMNS.index("gain_accuracy")] = ""
            lines.append(f"| {name} | {len(points)} | " + " | ".join(cells) + " |")
        else:
            lines.append(f"| {name} | not run |" + " |" * len(COLUMNS))
    return "\n".join(lines)


def costs_table(folder: Path) -> str:
    """Forward passes, time and memory of a step for every model that was measured."""
    heads = "model", "step", "forward passes", "median, ms", "least, ms", "least, times ORPO's", "weights, MiB"
    lines = ["| " + " | ".join(heads) + " | working memory, MiB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    stamps = []
    for path in sorted(folder.glob("costs-*.json")):
        record = json.loads(path.read_text())
        stamps.append(f"{record['pairs']} pairs on {record['stamp']['device']}, {record['stamp']['threads']} thread(s)")
        base = record["kinds"]["orpo"]["least"]
        for kind, f in record["kinds"].items():
            lines.append(
                f"| {record['model']} | {kind} | {f['forward passes']} | {1e3 * f['median']:.0f} | "
                f"{1e3 * f['least']:.0f} | {f['least'] / base:.2f} | {f['weights MiB']:.1f} | {f['working MiB']:.1f} |"
            )
    return "\n".join([*lines, "", *dict.fromkeys(stamps)]) if stamps else "Not measured."


def ratios_table(folder: Path) -> str:
    """Spread of both ratios, from ``ratios.json``."""
    path = folder / "ratios.json"
    if not path.exists():
        return "Not sampled."
    lines = ["| | standard deviation | 5 % | 25 % | median | 75 % | 95 % |", "|---|---|---|---|---|---|---|"]
    for name, f in json.loads(path.read_text()).items():
        lines.append(
            f"| {name} | {f['standard deviation']:.2f} | " + " | ".join(f"{q:.2f}" for q in f["quantiles"]) + " |"
        )
    return "\n".join(lines)


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


def page(text: str, folder: Path = RESULTS) -> str:
    """`text` with every marked section written anew.

    Raises:
        ValueError: a section has no markers in `text`.
    """
    for name, body in sections(folder).items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        if not re.search(pattern, text, re.S):
            raise ValueError(f"the page has no section between <!-- {name} --> and <!-- end of {name} -->")
        text = re.sub(pattern, lambda m, body=body: f"{m[1]}\n{body}\n\n{m[2]}", text, flags=re.S)
    return text


def main(folder: Path = RESULTS) -> None:
    series = {title: of_one_plan(name, folder) for name, title in SERIES.items()}
    for name, runs in PICTURES.items():
        print(draw_curves(series, runs, folder / name))
    PAGE.write_text(page(PAGE.read_text(), folder))
    print(PAGE)


if __name__ == "__main__":
    main()
