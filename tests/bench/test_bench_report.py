"""What is committed as results is what the stored figures say (report.py), and the tables hide no loss (tables.py)."""

from pathlib import Path

import pytest
import torch

from benchmarks import cases, pictures, report, results, tables
from benchmarks.gate import LIMITS, is_right

ROOT = Path(__file__).resolve().parents[2]
ROW = dict(group="heads", head="h", pairs=1, positions=8, prompt=4, padded=False, V=10, D=4, dtype="float32",
           kind="step", status="measured", q20=1.0, q80=1.0, peak_bytes=2**20, error_loss=0.0, error_dx=0.0,
           error_dw=0.0, device="x")  # fmt: skip


@pytest.fixture(scope="module")
def stored():
    return report.load_all()


def test_what_is_committed_is_what_the_report_writes(stored):
    from PIL import Image

    assert (ROOT / "benchmarks" / "RESULTS.md").read_text() == report.pages(stored)
    shown = [r for part in report.drawn(stored).values() for r in part]
    assert Image.open(report.PICTURE).info["Description"] == pictures.fingerprint(shown)
    shown = [r for _, part in report.growing(stored).values() for r in part]
    assert Image.open(report.MEMORY).info["Description"] == pictures.fingerprint(shown)


def test_the_page_is_short_and_all_has_every_case(stored, capsys):
    page = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    assert len(page.split()) < 3000 and "| training step |" in page and "random words" not in page
    before = report.MEMORY.stat().st_mtime_ns
    report.main(["--all"])
    printed = capsys.readouterr().out
    for title in ("Another is more than 5 % faster than ours", "Eight heads", "Frozen head", "Accuracy"):
        assert f"\n## {title}\n" in printed and f"\n## {title}\n" not in page
    assert "random words" in printed and report.MEMORY.stat().st_mtime_ns == before


def test_the_picture_of_memory_has_every_peer_at_every_size(stored, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))
    pictures.growth(report.growing(stored), tmp_path / "memory.png", "where")
    by_vocabulary, by_length = saved[0].axes
    for axis, sizes in ((by_vocabulary, [8192, 16384, 32768, 65536, 131072]), (by_length, [64, 128, 256, 512])):
        assert [list(line.get_xdata()) for line in axis.lines] == [sizes] * 5
        colours = {line.get_label(): line.get_color() for line in axis.lines}
        assert colours == {peer: pictures.PEER_COLOURS[peer] for peer in colours} and axis.get_ylim()[0] == 0
    # As stored: TRL's at the longest sequence, and ours by strips.
    ends = {line.get_label(): round(line.get_ydata()[-1]) for line in by_length.lines}
    assert (ends["trl"], ends["ours"], ends["ours (strips)"]) == (895, 169, 98)


def test_the_table_of_the_readme_is_of_stored_figures(stored):
    readme = (ROOT / "README.md").read_text()
    names = {
        "ours": "fused-orpo",
        "ours (strips)": "fused-orpo, `logits_budget=0`",
        "torch compiled": "torch.compile",
        "trl chunked": "TRL, chunked log-probabilities",
        "trl": "TRL",
    }
    for peer, name in names.items():
        (row,) = (r for r in stored["gpu"] if (r["head"], r["kind"], r["peer"]) == ("Llama-3-8B", "step", peer))
        figures = f"| {name} | {1e3 * row['median']:.1f} ms | {row['peak_bytes'] / 2**20:,.0f} MiB |"
        assert figures in readme.replace("**", ""), figures


def test_stored_figures_are_right_by_todays_gate_and_measured_beside_their_peers(stored):
    loss = {group: rows for group, rows in stored.items() if group in (*report.LOSS_GROUPS, *report.GPU_GROUPS)}
    for group, rows in loss.items():
        machines: dict[tuple, set] = {}
        for r in rows:
            assert r["status"] == "measured" or not r["peer"].startswith("ours")
            if r["status"] == "measured":
                assert is_right(tuple(map(r.get, tables.ERRORS)), getattr(torch, r["dtype"]))
            # `--again --peers ours` would set new figures of ours beside others' old ones.
            case = tuple(r.get(name) for name in results.KEY if name not in ("peer", "kind", "device"))
            machines.setdefault(case, set()).add((r["device"], r["commit"]))
        assert all(len(found) == 1 for found in machines.values()), group


def test_the_reasons_of_the_page_are_true_of_every_case(stored):
    """benchmarks/README.md says of whom ours loses to, and where."""
    cpu = [r for group in report.LOSS_GROUPS for r in report.shown(stored, group)]
    for figure in ("median", "peak_bytes"):
        lines = tables.losses(cpu, figure)
        assert lines and {line[5] for line in lines} == {"cce"}
    gpu = tables.losses(stored["gpu"], "median")
    assert gpu and all(line[3] == "evaluation" or line[0] in ("SmolLM2-135M", "Mistral-7B-v0.3") for line in gpu)


def test_a_faster_or_smaller_peer_is_named_with_its_figures():
    rows = [{**ROW, "peer": "ours", "median": 2.0}, {**ROW, "peer": "ours (strips)", "median": 3.0}]
    assert tables.losses([*rows, {**ROW, "peer": "trl", "median": 1.95}], "median") == []
    (line,) = tables.losses([*rows, {**ROW, "peer": "trl", "median": 1.5}], "median")
    assert line[-5:] == ["x", "trl", "1.5 s", "2 s", "3 s"]
    large = [{**row, "peak_bytes": 2**22} for row in rows]
    (line,) = tables.losses([*large, {**ROW, "peer": "trl", "median": 9.0}], "peak_bytes")
    assert line[-4:] == ["trl", "1 MiB", "4 MiB", "4 MiB"]
    # On another machine it is no comparison.
    assert tables.losses([*rows, {**ROW, "peer": "trl", "median": 1.5, "device": "y"}], "median") == []


def test_the_summary_counts_cases_won_and_lost():
    first = [{**ROW, "peer": "ours", "median": 2.0, "peak_bytes": 10}, {**ROW, "peer": "trl", "median": 4.0}]
    second = [{**row, "prompt": 6, "median": 2.2} for row in first]
    second.append({**second[1], "peer": "cce", "median": 2.0, "peak_bytes": 9})
    (line,) = tables.summary_table([*first, *second]).splitlines()[2:]
    # 10 % slower than CCE on the second, 11 % larger.
    share = f"{100 * 10 / 2**20:.0f}"
    cells = ["float32", "ours", "1 of 2", "1 of 2", "1.5 (1.0 to 2.0)", f"{share} ({share} to {share})"]
    assert line == f"| forward and backward | {' | '.join(cells)} |"
    # Without TRL, which may be wrong there, a case counts beside the others, and alone it does not.
    (line,) = tables.summary_table(second[::2]).splitlines()[2:]
    assert line == "| forward and backward | float32 | ours | 0 of 1 | 0 of 1 |  |  |"
    assert tables.summary_table(second[:1]).count("\n") == 1


def test_the_wide_table_marks_the_least_and_names_the_wrong():
    rows = [
        {**ROW, "peer": "ours", "median": 2.0, "peak_bytes": 2**21},
        {**ROW, "peer": "trl", "median": 1.5, "peak_bytes": 2**22},
        {**ROW, "peer": "cce", "status": "failed: RuntimeError: no"},
        {**ROW, "peer": "ours", "median": 3.0, "kind": "evaluation", "padded": True},
    ]
    header, _, step, evaluation = tables.wide_table(rows).splitlines()
    assert header == "| head | batch | dtype | what | ours | trl | cce |"
    assert (
        "| V 10, D 4 | 1 x 8, 4 prompt | float32 | forward and backward | 2 s, **2** MiB | **1.5** s, 4 MiB |" in step
    )
    assert step.endswith("| failed |") and "| 1 x 8, padded | float32 | evaluation | **3** s, **1** MiB |" in evaluation
    (line,) = tables.error_table([{**ROW, "peer": "ours", "error_dx": e} for e in (1e-3, 4e-3)]).splitlines()[2:]
    assert line == "| ours | float32 | 0e+00 | 4e-03 | 0e+00 |"
    assert tables.exponent([(x, 3 * x**1.5) for x in (1, 2, 7, 20)]) == pytest.approx(1.5)


def test_a_run_writes_its_stamp_once_and_what_is_measured_again_replaces(tmp_path, monkeypatch):
    results.append("heads", [{**ROW, "peer": "ours", "median": 2.0}], tmp_path)
    results.append("heads", [{**ROW, "peer": "trl", "median": 4.0, "seconds": [4.0]}], tmp_path)
    lines = (tmp_path / "heads.jsonl").read_text().splitlines()
    assert [line.startswith('{"stamp"') for line in lines] == [True, False, False]
    monkeypatch.setattr(results, "stamp", lambda: {"torch": "9"})
    results.append("heads", [{**ROW, "peer": "ours", "median": 1.0}], tmp_path)
    trl, ours = results.load("heads", tmp_path)
    assert ours["torch"] == "9" != trl["torch"] and "seconds" not in trl
    # A ratio is that of the medians beside it; another machine's TRL is not the one to compare with.
    assert ours["ratio"] == 4.0
    results.append("heads", [{**ROW, "device": "y", "peer": "ours", "median": 1.0}], tmp_path)
    assert "ratio" not in results.load("heads", tmp_path)[-1]


@pytest.mark.parametrize("name,limit", list(zip(("loss", "dx", "dw"), (*LIMITS[torch.bfloat16], 0.02), strict=True)))
def test_what_a_wider_gate_timed_is_judged_by_todays(tmp_path, name, limit):
    row = {**ROW, "peer": "trl", "dtype": "bfloat16", "median": 2.0}
    results.append("heads", [{**row, f"error_{name}": 2 * limit}, {**row, "peer": "ours"}], tmp_path)
    trl, ours = results.load("heads", tmp_path)
    # Nobody is compared with it.
    assert trl["status"] == "wrong" and not {"median", "q20", "q80"} & trl.keys() and "ratio" not in ours


def test_tables_are_of_one_machine_a_dtype():
    """One that emulates bfloat16 measures float32 alone."""
    rows = [{**ROW, "dtype": d, "device": "x"} for d in ("float32", "bfloat16")]
    rows.append({**ROW, "device": "y"})
    # Of two with as much, the last; another peer is no other case.
    assert [(r["dtype"], r["device"]) for r in results.one_machine(rows)] == [("float32", "y"), ("bfloat16", "x")]
    rows += [{**ROW, "head": "g", "device": "x"}, {**ROW, "device": "y", "peer": "trl"}]
    assert {r["device"] for r in results.one_machine(rows)} == {"x"}


def test_the_picture_says_who_was_wrong(tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda self, x, y, text, **_: texts.append((x, text)))
    heads = [{**ROW, "head": head, "peer": "trl", "ratio": 1.0} for head in ("OPT-350M", "Phi-2")]
    wrong = [{**ROW, "head": "Phi-2", "peer": "trl", "status": "wrong"}]
    path = tmp_path / "heads.png"
    assert pictures.bars({"a": heads, "b": wrong}, path, lambda r: r.get("ratio"), "", "") and path.exists()
    assert texts == [(0, "not measured"), (1, "TRL: wrong")]
    assert not pictures.bars({"b": wrong}, path, lambda r: r.get("ratio"), "", "")


def test_lengths_drawn_have_the_medians_and_the_padding_of_the_data():
    drawn = cases.draw(4000)
    for i, name in enumerate(cases.QUANTILES):
        median, counted = cases.QUANTILES[name][10], sorted(pair[i] for pair in drawn)[2000]
        assert abs(counted - median) <= 0.1 * median
    totals = [[p + answer for p, *answers in drawn[i : i + 4] for answer in answers] for i in range(0, 4000, 4)]
    padding = [1 - sum(batch) / (max(batch) * len(batch)) for batch in totals]
    assert sum(padding) / len(padding) == pytest.approx(0.46, abs=0.04)
    with pytest.raises(ValueError, match="longest is 10; the shortest pair has 15"):
        cases.draw(1, longest=10)
