"""The paper's evidence: scripts run, the page says what is stored, baselines compute what they are named for."""

import json
import math

import pytest
import torch

from benchmarks.paper import costs, equations, methods, ratios, report, train


@pytest.fixture(scope="module")
def start():
    return train.demonstration(train.QUICK, seed=0, quick=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    train.main(["--quick", "--output", str(folder)])
    return folder


def both_layouts(start):
    return [methods.layout_of(m, start.pad_token_id)(start.train[:3]) for m in ("sft", "orpo")]


def test_every_equation_holds():
    assert [e.name for e, ok in equations.run() if not ok] == []


def test_a_wrong_equation_ends_with_an_error(monkeypatch):
    monkeypatch.setattr(equations.reference, "log_odds_ratio", lambda a_w, a_l: a_w - a_l)
    with pytest.raises(SystemExit, match="equations fail: 5"):
        equations.main()


def test_the_page_shows_what_is_stored():
    text = report.PAGE.read_text()
    assert report.with_blocks(text, report.sections()) == text, "run python -m benchmarks.paper.report"


def test_a_page_without_a_section_is_refused():
    with pytest.raises(ValueError, match="<!-- equations -->"):
        report.with_blocks("no markers", report.sections())


def test_runs_of_two_plans_are_not_reported_as_one(quick, tmp_path):
    first, second, *_ = map(json.loads, (quick / "quick.jsonl").read_text().splitlines())
    second["settings"]["learning_rate"] *= 2
    (tmp_path / "demo.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    with pytest.raises(ValueError, match=r"demo\.jsonl holds runs with different settings"):
        report.sections(tmp_path)


def test_every_run_is_stored_with_its_forward_passes(quick):
    records = {r["run"]: r for r in train.load("quick", quick)}
    assert list(records) == list(train.RUNS)
    assert {run: r["calls"] for run, r in records.items()} == {run: 2 if run == "dpo:0.1" else 1 for run in train.RUNS}
    assert len({json.dumps(r["curve"][0]) for r in records.values()}) == 1
    assert all(r["curve"][-1]["step"] == train.QUICK.steps for r in records.values())


def test_a_stopped_series_goes_on_with_what_is_missing(quick, tmp_path):
    lines = (quick / "quick.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "quick.jsonl").write_text("".join(lines[:-1]))
    train.main(["--quick", "--output", str(tmp_path)])
    again = (tmp_path / "quick.jsonl").read_text().splitlines(keepends=True)
    assert again[:-1] == lines[:-1] and len(again) == len(lines)
    old, new = json.loads(lines[-1]), json.loads(again[-1])
    assert old["losses"] == new["losses"]


def test_pictures_are_drawn_from_stored_runs(quick, tmp_path):
    path = report.draw_curves({"tiny": train.load("quick", quick)}, ["sft", "orpo:1.0"], tmp_path / "p.png")
    assert path.stat().st_size > 5_000
    assert report.draw_curves({"tiny": []}, ["sft"], tmp_path / "none.png") is None


def test_ratios_and_costs_run(tmp_path):
    ratios.main(["--quick", "--output", str(tmp_path)])
    costs.main(["--quick", "--output", str(tmp_path)])
    figures = json.loads((tmp_path / "costs-demo.json").read_text())["kinds"]
    passes = {kind: f["forward passes"] for kind, f in figures.items()}
    generated = passes.pop("ppo") - 3 - 4
    assert 1 <= generated <= 64
    assert passes == {"sft": 1, "orpo": 1, "dpo": 2, "dpo precomputed": 1}
    weights = {kind: f["weights MiB"] / figures["orpo"]["weights MiB"] for kind, f in figures.items()}
    assert weights["dpo"] == pytest.approx(2, abs=0.05) and weights["ppo"] == pytest.approx(3, abs=0.05)
    spread = {name: f["standard deviation"] for name, f in json.loads((tmp_path / "ratios.json").read_text()).items()}
    assert spread["log OR"] > 1.5 * spread["log PR"]


def test_dpo_begins_at_log_2_and_falls_as_chosen_gains(start):
    _, batch = both_layouts(start)
    sums_S = methods.reference_sums(start.model, batch)
    at_start = methods.loss_of("dpo", start.model, batch, 0.1, sums_S)
    assert at_start.item() == pytest.approx(math.log(2), abs=1e-5)
    lower_S = sums_S - torch.tensor([1.0] * 3 + [0.0] * 3)
    gained = methods.loss_of("dpo", start.model, batch, 0.1, lower_S)
    assert gained.item() == pytest.approx(math.log1p(math.exp(-0.1)), abs=1e-5)


def test_orpo_with_lambda_0_is_fine_tuning_on_the_chosen_sequences(start):
    chosen, pairs = both_layouts(start)
    assert len(chosen["input_ids"]) == 3
    sft = methods.loss_of("sft", start.model, chosen, 0.0)
    assert sft.item() == pytest.approx(methods.loss_of("orpo", start.model, pairs, 0.0).item(), abs=1e-5)


def test_the_probability_ratio_is_orpo_without_the_denominators(start):
    _, batch = both_layouts(start)
    mean_w, mean_l = methods.scores(start.model, batch).mean_S.split(3)
    term = torch.log1p(torch.exp(mean_l - mean_w)).mean()
    loss, nll = (methods.loss_of("probability_ratio", start.model, batch, beta) for beta in (0.5, 0.0))
    assert (loss - nll).item() == pytest.approx(0.5 * term.item(), abs=1e-5)


def test_a_head_that_the_scores_do_not_follow_is_refused(start):
    _, batch = both_layouts(start)
    methods.check_head(start.model, batch)
    hook = start.model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match="nats off the model's own"):
        methods.check_head(start.model, batch)
    hook.remove()


@pytest.mark.parametrize("run, says", [("orpo", "need one"), ("sft:0.1", "takes no beta"), ("ppo:1", "one of sft")])
def test_a_run_that_is_no_run_is_refused(run, says):
    with pytest.raises(ValueError, match=says):
        train.parse_run(run)


def test_a_batch_larger_than_the_data_is_refused(start):
    with pytest.raises(ValueError, match="40 pairs, a batch 999"):
        next(train.batches(start.train, train.Plan(batch_size=999), seed=0))
