"""python -m benchmarks.gpu: what it draws, and what it refuses before the tests, which take minutes."""

import pytest
import torch

from benchmarks import gpu, peers
from benchmarks.cases import TINY, make_batch
from benchmarks.peers import PEERS


def test_without_a_gpu_the_command_says_so_and_ends_well(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 0
    assert "No GPU here" in capsys.readouterr().out


def test_ours_within_a_budget_is_ours_with_it(monkeypatch):
    asked, original = [], peers.orpo_loss
    monkeypatch.setattr(peers, "orpo_loss", lambda *a, **k: asked.append(k["logits_budget"]) or original(*a, **k))
    batch = make_batch(TINY, torch.float32)
    found = [peers.ours_within(budget)(batch, 0.1) for budget in (0, 2**20)]
    assert asked == [0, 2**20] and torch.equal(found[0], PEERS["ours (strips)"](batch, 0.1))


@pytest.mark.parametrize(
    "options,said",
    [
        (["--heads", "Mistral"], "--heads names 'Mistral'; there are OPT-350M, "),
        (["--budgets", "256,much"], "invalid budgets value"),
        (["--budgets", "-1"], "invalid budgets value"),
        (["--quick", "--heads", "Phi-2"], "--quick has a tiny head of its own, and would ignore --heads"),
        (["--rounds", "0"], "--rounds is 0"),
    ],
)
def test_wrong_options_end_before_the_tests(monkeypatch, capsys, options, said):
    monkeypatch.setattr(gpu, "run_tests", lambda device: pytest.fail("it tests first"))
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", *options])
    assert said in capsys.readouterr().err


def test_a_cpu_beside_a_gpu_is_not_measured_under_its_name(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_tests", lambda device: pytest.fail("it tests first"))
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--quick"])
    assert "hide it with CUDA_VISIBLE_DEVICES=" in capsys.readouterr().err


@pytest.mark.parametrize("timed", [True, False])
def test_what_was_timed_is_written_and_drawn(monkeypatch, capsys, tmp_path, timed):
    if torch.cuda.is_available():
        pytest.skip("--device cpu is refused beside a GPU")

    def wrong(batch, beta):
        return 2 * PEERS["ours"](batch, beta)

    within = peers.ours_within
    monkeypatch.setattr(gpu, "PEERS", {"ours": PEERS["ours"] if timed else wrong})
    monkeypatch.setattr(gpu, "ours_within", lambda budget: within(budget) if timed else wrong)
    options = ["--device", "cpu", "--quick", "--skip-tests", "--rounds", "1", "--budgets", "1", "--out", str(tmp_path)]
    (tmp_path / "gpu.png").write_text("an earlier run's")
    assert gpu.main(options) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "gpu.csv").exists() and (tmp_path / "gpu.png").exists() == timed
    assert ("gpu.png" in said) == timed and ("no peer was timed" in said) != timed
    assert "ours, budget 1 MiB" in (tmp_path / "gpu.csv").read_text()
