"""What is committed as results is what the stored figures say (report.py), and the report hides no loss."""

from pathlib import Path

import pytest
import torch

from benchmarks import gpu_page, lost, report, results, tables
from benchmarks.gate import LIMITS

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
    stored = results.shown_in(group, report.load_all())
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


def test_the_reason_for_losing_on_a_gpu_fits_every_case():
    stored = report.load_all()
    rows = [r for r in stored["gpu"] if not r["peer"].startswith(gpu_page.BUDGET)]
    lines = tables.losses(rows)
    few = ("SmolLM2-135M", "Mistral-7B-v0.3")
    assert lines and all("evaluation" in line or line.startswith(tuple(f"* {head}," for head in few)) for line in lines)
    # "1 to 16 % less time".
    times = {(r["kind"], r["peer"]): r["median"] for r in rows if r["head"] == "Mistral-7B-v0.3"}
    earlier = {(r["kind"], r["peer"]): r["median"] for r in stored["gpu_peers"] if not r["peer"].startswith("ours")}
    ratios = [1 - earlier[case] / times[case] for case in earlier.keys() & times.keys()]
    assert 0.005 < min(ratios) and max(ratios) < 0.165 and len(ratios) == 9


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


def test_the_picture_of_prompt_shares_is_drawn(tmp_path):
    from PIL import Image

    from benchmarks.pictures import at_every_share, fingerprint, ratios_by_share, shares

    rows = [
        {**ROW, "head": head, "peer": peer, "prompt": prompt, "dtype": dtype, "ratio": 1.0 + prompt}
        for head in ("a", "b")
        for peer in ("ours", "trl")
        for prompt in (0, 4)
        for dtype in ("float32", "bfloat16")
    ]
    assert ratios_by_share(rows[:8]) == {0.0: [1.0] * 4, 50.0: [5.0] * 4}
    # A head that lacks one share is no part of the means.
    assert {r["head"] for r in at_every_share([r for r in rows[:-2] if r["peer"] == "trl"])} == {"a"}
    shares(rows, tmp_path / "shares.png", "caption")
    assert Image.open(tmp_path / "shares.png").info["Description"] == fingerprint(rows)


def test_who_is_wrong_stands_in_the_readmes_table_and_in_its_picture(tmp_path, monkeypatch):
    from benchmarks import pictures

    versions = dict.fromkeys(("threads", "torch", "trl", "liger-kernel", "cut-cross-entropy", "commit"), "1")
    rows = [
        {**ROW, **versions, "head": head, "peer": peer, "median": 1.0, "ratio": 1.0}
        for head in ("OPT-350M", "Phi-2")
        for peer in ("ours", "trl")
    ]
    stored = {"heads": rows, "gpu": report.load_all()["gpu"], "training": []}
    assert "wrong" not in report.readme_block(stored)
    rows[3] = {**ROW, **versions, "head": "Phi-2", "peer": "trl", "status": "wrong"}
    del rows[2]["ratio"]
    block = report.readme_block(stored)
    assert "`wrong` is further from float64" in block and "| **1** s, **1** MiB | wrong |" in block
    assert pictures.reason(rows, "Phi-2", "float32") == "TRL: wrong"
    assert pictures.reason(rows, "Phi-2", "bfloat16") == "not measured"
    texts = []
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda self, x, y, text, **_: texts.append((x, text)))
    rows.append({**rows[2], "head": "Phi-2", "kind": "step", "dtype": "bfloat16", "ratio": 1.0})
    pictures.heads(rows, tmp_path / "heads.png", "caption")
    assert (1, "TRL: wrong") in texts and (0, "not measured") in texts


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
    assert {r["device"] for r in results.shown_in("heads", stored)} == {"y"}
    assert [r["device"] for r in results.shown_in("prompt_share", stored)] == ["x", "x"]
    # One piece on another machine does not replace a whole table, whoever was measured in it.
    stored["heads"] = [{**ROW, "head": h, "device": "x"} for h in "gh"]
    stored["heads"] += [{**ROW, "peer": peer, "device": "y"} for peer in ("ours", "trl", "cce")]
    assert {r["device"] for r in results.shown_in("heads", stored)} == {"x"}


def test_each_dtype_has_its_machine_in_a_picture():
    """One that emulates bfloat16 measures float32 alone, and its newer figures are shown beside older ones."""
    versions = dict.fromkeys(("threads", "torch", "trl", "liger-kernel", "cut-cross-entropy"), "1")
    heads = [{**ROW, **versions, "dtype": d, "device": "x", "commit": "old"} for d in ("float32", "bfloat16")]
    heads.append({**ROW, **versions, "dtype": "float32", "device": "y", "commit": "new"})
    stored = {"heads": heads, "prompt_share": [{**heads[-1], "prompt": 0}]}
    shown = results.shown_in("heads", stored)
    assert [(r["dtype"], r["device"]) for r in shown] == [("float32", "y"), ("bfloat16", "x")]
    said = tables.caption_by_dtype(shown)
    assert said.startswith("float32 on y, ") and "commit new; bfloat16 on x, " in said and said.endswith("commit old")
    assert tables.caption_by_dtype(heads[:2]) == tables.caption(heads[:2])
    # The half of a dtype whose other shares nobody measured is no curve.
    assert {r["dtype"] for r in results.shown_in("prompt_share", stored)} == {"float32"}


@pytest.mark.parametrize("name,limit", list(zip(("loss", "dX", "dW"), (*LIMITS[torch.bfloat16], 0.02), strict=True)))
def test_what_a_wider_gate_timed_is_judged_by_todays(tmp_path, name, limit):
    """RESULTS.md says that all that was timed agrees with float64."""
    row = {**ROW, "peer": "trl", "dtype": "bfloat16", "median": 2.0, "ratio": 1.0}
    wrong = {**row, f"error_{name.lower()}": 2 * limit}
    results.append("heads", [row, {**row, "peer": "ours"}], tmp_path)
    assert [r["ratio"] for r in results.load("heads", tmp_path)] == [1.0, 1.0]
    results.append("heads", [wrong], tmp_path)
    ours, trl = results.load("heads", tmp_path)
    # Nobody is compared with it.
    assert trl["status"] == "wrong" and not {"median", "q20", "q80", "ratio"} & trl.keys() and "ratio" not in ours
    said = f"trl (h, 1 x 8, bfloat16: {name} off by {2 * limit:.1e}, limit {limit:.0e})"
    assert said in tables.beyond_limits([ours, trl]) and tables.beyond_limits([ours, row]) == ""


def test_who_is_wrong_is_named_and_ours_is_not_among_them():
    stored = [r for group in report.LOSS_GROUPS for r in report.load_all()[group]]
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    wrong = [r for r in stored if r["status"] == "wrong"]
    assert all(f"{r['peer']} ({r['head']}, {r['pairs']} x {r['positions']}, {r['dtype']}" in text for r in wrong)
    assert not any(r["peer"].startswith("ours") for r in wrong)
    for r in stored:
        of_loss, of_gradients = LIMITS[getattr(torch, r["dtype"])]
        if r["status"] == "measured":
            assert r["error_loss"] < of_loss and max(r["error_dx"], r["error_dw"]) < of_gradients


def test_the_readme_says_which_rows_had_a_fixed_order():
    stored = report.load_all()
    said = "are in part from before rounds had an order of their own"
    rows = [r for r in results.shown_in("heads", stored) if r["status"] == "measured"]
    early = {r["dtype"] for r in lost.earlier(rows)}
    block = report.readme_block(stored)
    assert (said in block) == bool(early)
    assert not early or f"Rows of {' and '.join(sorted(early))} {said}" in block
    stored["heads"] = [{**r, "commit": "331b40d" if r["dtype"] == "bfloat16" else "new"} for r in stored["heads"]]
    assert f"Rows of bfloat16 {said}" in report.readme_block(stored)
    stored["heads"] = [{**r, "commit": "new"} for r in stored["heads"]]
    assert said not in report.readme_block(stored)


def test_the_default_form_alone_loses_more_often():
    rows = [{**ROW, "peer": peer, "median": t} for peer, t in (("ours", 3.0), ("ours (strips)", 1.0), ("trl", 2.0))]
    assert tables.losses(rows) == [] and len(tables.losses(rows, forms=("ours",))) == 1
    assert tables.losses_of_the_default(rows) == tables.losses(rows, forms=("ours",))
    rows[1]["median"] = 2.5
    assert tables.losses(rows) and tables.losses_of_the_default(rows) == []


@pytest.mark.parametrize("trl", ["trl", "trl orpo"])
def test_a_ratio_is_that_of_the_medians_beside_it(trl, tmp_path):
    rows = [{**ROW, "peer": peer, "median": t, "ratio": 7.0} for peer, t in (("ours", 2.0), (trl, 5.0))]
    # Another machine's TRL is not the one to compare with.
    alone = {**rows[0], "device": "z"}
    failed = [
        {**ROW, "device": "w", "peer": "ours", "median": 1.0},
        {**ROW, "device": "w", "peer": trl, "status": "wrong"},
    ]
    results.append("heads", [*rows, {**rows[1], "median": 50.0, "device": "y"}, alone, *failed], tmp_path)
    assert [r.get("ratio") for r in results.load("heads", tmp_path)] == [2.5, 1.0, 1.0, None, None, None]


def test_peers_of_a_case_were_measured_together():
    """`--again --peers ours` would set new figures of ours beside others' old ones."""
    for group, rows in report.load_all().items():
        commits: dict[tuple, set[str]] = {}
        for r in rows:
            case = tuple(r.get(name) for name in results.KEY if name not in ("peer", "kind"))
            commits.setdefault(case, set()).add(r["commit"])
        mixed = [case for case, of in commits.items() if len(of) > 1]
        assert group in ("long", "accuracy", "cost") or not mixed


def test_what_is_not_measured_is_said_by_head_and_batch():
    (piece,) = report.LOSS_GROUPS["bfloat16"]
    c = piece.case
    assert report.not_measured("bfloat16", []) == ["OPT-350M in bfloat16 (1 x 64 with 32 prompt)"]
    row = dict(head=c.name, pairs=1, positions=64, prompt=32, padded=False, V=c.vocabulary, dtype="bfloat16")
    assert report.not_measured("bfloat16", [row]) == []
    assert len(report.not_measured("bfloat16", [{**row, "dtype": "float32"}])) == 1
    assert report.not_measured("accuracy", []) == []


def test_machines_on_which_liger_evaluated_with_one_gradient_more_are_named():
    """The same bytes in training and evaluation show it: without dX its peak is lower."""
    peaks: dict[str, list[bool]] = {}
    stored = report.load_all()
    rows = {results.key_of(r): r for group in ("targets", "heads", "padding") for r in stored[group]}
    for r in rows.values():
        if r["peer"].startswith("liger") and r["kind"] == "evaluation":
            step = rows[results.key_of({**r, "kind": "step"})]
            peaks.setdefault(r["device"], []).append(r["peak_bytes"] == step["peak_bytes"])
    for device, same in peaks.items():
        assert all(same) if "(AVX" not in device else not any(same), device
