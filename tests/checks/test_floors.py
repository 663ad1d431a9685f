"""tests/tools/floors.py and tests/hosts: what they compare, and that lower bounds are versions that were tried."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.hosts.__main__ import HOSTS, largest_difference  # noqa: E402
from tests.tools.floors import FLOORS, PAGE, row, with_rows  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def bounds(entries):
    found = (re.match(r"([\w-]+)>=([\d.]+)", entry) for entry in entries)
    return {match[1]: match[2] for match in found if match}


def pinned(floor):
    return dict(re.findall(r"([\w-]+)==([\d.]+)", " ".join(FLOORS[floor].packages)))


def test_lower_bounds_are_versions_that_were_tried():
    tried = {name: pinned("loss")[name] for name in ("torch", "triton")}
    tried |= {name: pinned("trainer")[name] for name in ("transformers", "datasets", "accelerate", "peft")}
    extras = PROJECT["optional-dependencies"]
    declared = bounds([*PROJECT["dependencies"], *extras["train"], *extras["peft"]])
    assert {name: declared[name] for name in tried} == {name: v.removesuffix(".0") for name, v in tried.items()}


def test_the_page_has_a_row_of_each_floor_with_its_versions():
    page = PAGE.read_text()
    for name, floor in FLOORS.items():
        cells = [
            cell.strip() for cell in re.search(rf"^\| {re.escape(floor.what)} \|(.*)\|$", page, re.M)[1].split("|")
        ]
        assert set(pinned(name).values()) <= set(cells) and int(cells[-1]) > 0


def test_a_row_replaces_the_one_of_the_same_name():
    page = "| | torch | passed |\n|---|---|---|\n| a | 1 | 2 |\n| b | 3 | 4 |\n"
    assert with_rows(page, [row("b", ["5"], "6")]) == page.replace("| b | 3 | 4 |", "| b | 5 | 6 |")
    with pytest.raises(ValueError, match=r"0 rows that begin with '\| c'"):
        with_rows(page, [row("c", ["5"], "6")])


def test_runs_are_compared_figure_by_figure():
    steps = [{"loss": 1.0, "nll_loss": 2.0}] * 3
    assert largest_difference(steps, [*steps[:2], {"loss": 1.0, "nll_loss": 2.5}]) == 0.5
    with pytest.raises(SystemExit, match="logged different things"):
        largest_difference(steps, [*steps[:2], {"loss": 1.0}])
    with pytest.raises(SystemExit, match="logged different things"):
        largest_difference(steps[:2], steps[:2])


def test_each_host_has_its_script():
    assert all((ROOT / f"tests/hosts/run_{name.replace('-', '_')}.py").exists() for name in HOSTS)
    done = subprocess.run([sys.executable, "-m", "tests.hosts", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'nothing'" in done.stderr
