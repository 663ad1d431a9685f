"""What is committed as results is what the stored figures say (report.py), and the report hides no loss."""

from pathlib import Path

import pytest

from benchmarks import report, results, tables

ROOT = Path(__file__).resolve().parents[1]
ROW = dict(group="heads", head="h", pairs=1, positions=8, prompt=4, padded=False, V=10, D=4, dtype="float32",
           kind="step", status="measured", q20=1.0, q80=1.0, peak_bytes=2**20, error_loss=0.0, error_dx=0.0,
           error_dw=0.0, device="x")  # fmt: skip


def test_committed_results_are_what_the_report_writes():
    assert (ROOT / "benchmarks" / "RESULTS.md").read_text() == report.pages(report.load_all())


def test_figures_of_the_readme_are_the_stored_ones():
    stored = report.load_all()
    readme = (ROOT / "README.md").read_text()
    assert stored["heads"]
    assert readme == report.with_block(readme, report.readme_block(stored))


@pytest.mark.parametrize("group", report.PICTURES)
def test_pictures_are_drawn_from_the_stored_figures(group):
    from PIL import Image

    from benchmarks.pictures import fingerprint

    if not results.load(group):
        pytest.skip(f"no results of group {group} are stored")
    stored = report.shown_in(group, report.load_all())
    assert Image.open(results.FOLDER / f"{group}.png").info["Description"] == fingerprint(stored)


def test_a_faster_peer_is_named_with_both_times():
    rows = [{**ROW, "peer": "ours", "median": 2.0}, {**ROW, "peer": "ours (strips)", "median": 3.0}]
    assert tables.losses([*rows, {**ROW, "peer": "trl", "median": 1.95}]) == []
    (line,) = tables.losses([*rows, {**ROW, "peer": "trl", "median": 1.5}])
    assert "trl 1.5 s, ours 2 s" in line
    large = [{**row, "peak_bytes": 2**22} for row in rows]
    (line,) = tables.losses([*large, {**ROW, "peer": "trl", "median": 9.0}], figure="peak_bytes")
    assert "trl 1 MiB, ours 4 MiB" in line
    # On another machine it is no comparison.
    assert tables.losses([*rows, {**ROW, "peer": "trl", "median": 1.5, "device": "y"}]) == []


def test_the_reason_for_losing_fits_every_case_in_which_we_lose():
    stored = report.load_all()
    lines = tables.losses([r for group in report.LOSS_GROUPS for r in stored[group]])
    assert lines and all(": cce " in line for line in lines), "benchmarks/report.py gives a reason for CCE alone"


def test_the_reason_for_more_memory_fits_every_case_in_which_another_has_less():
    stored = report.load_all()
    lines = tables.losses([r for group in report.LOSS_GROUPS for r in stored[group]], figure="peak_bytes")
    assert all(", bfloat16, " in line and "no bfloat16)" in line for line in lines)


def test_a_measurement_taken_again_replaces_the_old_one(tmp_path):
    results.append("heads", [{**ROW, "peer": "ours", "median": 2.0}], tmp_path)
    results.append("heads", [{**ROW, "peer": "ours", "median": 1.0, "seconds": [1.0]}], tmp_path)
    (record,) = results.load("heads", tmp_path)
    assert record["median"] == 1.0 and "seconds" not in record
    # The newest stands last.
    results.append("heads", [{**ROW, "peer": "trl", "median": 2.0}], tmp_path)
    results.append("heads", [{**ROW, "peer": "ours", "median": 3.0}], tmp_path)
    assert [r["peer"] for r in results.load("heads", tmp_path)] == ["trl", "ours"]


def test_exponents_are_recovered():
    assert tables.exponent([(x, 3 * x**1.5) for x in (1, 2, 7, 20)]) == pytest.approx(1.5)


def test_lengths_drawn_have_the_shares_of_the_data():
    from benchmarks import lengths

    drawn = lengths.draw(4000)
    for i, name in enumerate(lengths.QUANTILES):
        counted = sorted(pair[i] for pair in drawn)[2000]
        assert abs(counted - lengths.QUANTILES[name][10]) <= 0.1 * lengths.QUANTILES[name][10]
    assert lengths.prompt_share(drawn) == pytest.approx(0.73, abs=0.03)
    batches = [lengths.padding_share(drawn[i : i + 4]) for i in range(0, 4000, 4)]
    assert sum(batches) / len(batches) == pytest.approx(0.46, abs=0.04)
    with pytest.raises(ValueError, match="longest is 10; the shortest pair has 15"):
        lengths.draw(1, longest=10)


def test_a_wrong_peer_gets_no_time():
    import torch

    from benchmarks.cases import CASES
    from benchmarks.measure import measure_case
    from benchmarks.peers import PEERS

    eager = PEERS["torch eager"]

    def wrong(batch, beta):
        return 1.01 * eager(batch, beta)

    records = measure_case(CASES["tiny padded"], torch.float32, {"right": eager, "wrong": wrong}, ["step"], 1)
    status = {r["peer"]: r for r in records}
    assert status["right"]["status"] == "measured" and status["right"]["error_dw"] < 1e-5
    assert status["wrong"]["status"] == "wrong" and "median" not in status["wrong"]


def test_without_a_gpu_the_command_says_so_and_ends_well(capsys):
    import torch

    from benchmarks import gpu

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 0
    assert "No GPU here" in capsys.readouterr().out


def test_roofline_beside_the_bars_is_the_matmuls_at_the_cards_peak():
    from benchmarks.gpu import roofline_seconds

    row = dict(rows=8192, V=128256, D=4096)
    assert roofline_seconds({**row, "kind": "step"}, "NVIDIA H100 80GB HBM3") == pytest.approx(26.1e-3, rel=1e-2)
    one = roofline_seconds({**row, "rows": 1, "kind": "evaluation"}, "NVIDIA H100 80GB HBM3")
    assert one == pytest.approx(2 * 128256 * 4096 / 3.35e12)
    assert roofline_seconds({**row, "kind": "step"}, "some other card") is None


def test_the_picture_of_prompt_shares_is_drawn(tmp_path):
    from PIL import Image

    from benchmarks.pictures import fingerprint, ratios_by_share, shares

    rows = [
        {**ROW, "head": head, "peer": peer, "prompt": prompt, "dtype": dtype, "ratio": 1.0 + prompt}
        for head in ("a", "b")
        for peer in ("ours", "trl")
        for prompt in (0, 4)
        for dtype in ("float32", "bfloat16")
    ]
    assert ratios_by_share(rows[:8]) == {0.0: [1.0] * 4, 50.0: [5.0] * 4}
    shares(rows, tmp_path / "shares.png", "caption")
    assert Image.open(tmp_path / "shares.png").info["Description"] == fingerprint(rows)


def test_the_wide_table_marks_the_least_and_names_the_wrong():
    rows = [
        {**ROW, "peer": "ours", "median": 2.0, "peak_bytes": 2**21},
        {**ROW, "peer": "trl", "median": 1.5, "peak_bytes": 2**22},
        {**ROW, "peer": "cce", "status": "failed: RuntimeError: no"},
        {**ROW, "peer": "ours", "median": 3.0, "kind": "evaluation", "padded": True},
    ]
    lines = tables.wide_table(rows).splitlines()
    assert lines[0] == "| head | batch | dtype | what | ours | trl | cce |"
    assert (
        "| V 10, D 4 | 1 x 8, 4 prompt | float32 | forward and backward | 2 s, **2** MiB | **1.5** s, 4 MiB |"
        in lines[2]
    )
    assert (
        lines[2].endswith("| failed |") and "| 1 x 8, padded | float32 | evaluation | **3** s, **1** MiB |" in lines[3]
    )


def test_the_error_table_holds_the_largest():
    rows = [{**ROW, "peer": "ours", "error_dx": error} for error in (1e-3, 4e-3, 2e-3)]
    assert tables.error_table(rows).splitlines()[2:] == ["| ours | float32 | 0e+00 | 4e-03 | 0e+00 |"]


def test_a_picture_shows_the_machine_on_which_most_of_its_group_was_measured():
    stored = {"heads": [{**ROW, "device": d} for d in "xy"], "prompt_share": [{**ROW, "device": "x"}]}
    # Of two with as much, the last.
    assert {r["device"] for r in report.shown_in("heads", stored)} == {"y"}
    assert [r["device"] for r in report.shown_in("prompt_share", stored)] == ["x", "x"]
    # One piece on another machine does not replace a whole table.
    stored["heads"] = [{**ROW, "device": d} for d in "xxy"]
    assert {r["device"] for r in report.shown_in("heads", stored)} == {"x"}


def test_the_default_form_alone_loses_more_often():
    rows = [{**ROW, "peer": peer, "median": t} for peer, t in (("ours", 3.0), ("ours (strips)", 1.0), ("trl", 2.0))]
    assert tables.losses(rows) == [] and len(tables.losses(rows, forms=("ours",))) == 1


def test_a_trainers_ratio_is_that_of_the_medians_beside_it():
    rows = [{**ROW, "data": "d", "peer": peer, "median": t} for peer, t in (("ours shared", 2.0), ("trl orpo", 5.0))]
    # Another machine's TRL is not the one to compare with.
    rows.append({**rows[1], "median": 50.0, "device": "y"})
    assert tables.ratio_of_medians(rows[0], rows) == 2.5
