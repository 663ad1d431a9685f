"""python -m benchmarks.training: what is asked for, and nothing that would be ignored."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from benchmarks import test_bench_training as suite
from benchmarks import training


@pytest.fixture
def command(monkeypatch):
    """The command line; what it would measure, it notes."""
    calls = []
    monkeypatch.delenv("ORPO_BENCH_MODEL", raising=False)
    monkeypatch.setattr(training, "run", lambda *a, **k: calls.append(("run", a, {n: v for n, v in k.items() if v})))
    monkeypatch.setattr(training, "measure", lambda *a, **k: calls.append(("measure", a, k)) or [])

    def call(*options):
        calls.clear()
        monkeypatch.setattr("sys.argv", ["training", *options])
        training.main()
        return calls[0]

    return call


@pytest.mark.parametrize(
    "options,said",
    [
        (["--quick", "--model", "x"], "--quick has no --model: it is the small model"),
        (["--quick", "--rounds", "5"], "--quick has no --rounds"),
        (["--quick", "--shares", "10"], "--quick has no --shares"),
        (["--shares", "10", "--data", "x"], "--shares has no --data: its pairs are random words"),
        (["--shares", "10,a"], "--shares: invalid percents value: '10,a'"),
        (["--shares", ""], "--shares: invalid percents value: ''"),
        (["--shares", "0"], "--shares: a share is 1 to 99 %, not 0"),
        (["--dtype", ""], "--dtype: '' is none of float32, bfloat16"),
        (["--dtype", "float16"], "--dtype: 'float16' is none of float32, bfloat16"),
        (["--kinds", "ours"], "--kinds: 'ours' is none of"),
        (["--rounds", "0"], "--rounds is 0; it is at least 1"),
    ],
)
def test_what_would_be_ignored_or_fail_later_is_refused(command, capsys, options, said):
    with pytest.raises(SystemExit):
        command(*options)
    assert said in capsys.readouterr().err


def test_defaults_are_those_of_the_functions(command, monkeypatch):
    assert command() == ("run", (None, None), {"rounds": training.ROUNDS})
    assert command("--shares", "10,90") == ("run", (None, None), {"shares": (10, 90), "rounds": training.ROUNDS})
    own = command("--shares", "5", "--dtype", "bfloat16", "--rounds", "7", "--kinds", "ours packed", "--model", "m")
    kinds = ("ours packed", "trl orpo")
    assert own == ("run", ("m", None), {"shares": (5,), "rounds": 7, "dtypes": ("bfloat16",), "kinds": kinds})
    # The variable is no reason to refuse what has a model of its own.
    monkeypatch.setenv("ORPO_BENCH_MODEL", "env")
    assert command("--quick", "--kinds", "trl sft")[2]["kinds"] == ("trl sft", "trl orpo")
    assert command("--data", "d") == ("run", ("env", "d"), {"rounds": training.ROUNDS})


def test_trainers_take_turns_in_another_order_each_round(monkeypatch):
    """Who follows one that frees much memory finds it warm."""
    seen = []
    monkeypatch.setattr(training, "load_all", lambda **_: (None, None, [{}] * 4))
    monkeypatch.setattr(training, "make_trainer", lambda kind, *_: seen.append(kind))
    monkeypatch.setattr(training, "patched", lambda kind: nullcontext())
    monkeypatch.setattr(training, "train", lambda trainer: ([9.0, float(len(seen))], 10.0 * len(seen), 1.0))
    records = training.measure(None, None, rounds=4, batch=2, steps=2)
    count = len(training.KINDS)
    rounds = [seen[i : i + count] for i in range(0, 4 * count, count)]
    assert all(sorted(order) == sorted(training.KINDS) for order in rounds) and len({*map(tuple, rounds)}) == 4
    for r in records:
        # Whose turn it was is whose time it is; the first step is left out.
        turns = [at + 1 for at, kind in enumerate(seen) if kind == r["peer"]]
        assert r["seconds"] == [turn * (10.0 if r["kind"] == "whole run" else 1.0) for turn in turns]


def test_trainers_that_nobody_selected_are_not_measured():
    def item(trainer):
        return SimpleNamespace(originalname="test_training", callspec=SimpleNamespace(params={"trainer": trainer}))

    asked = [item("ours shared"), SimpleNamespace(originalname="test_loss")]
    assert suite.selected(asked) == ("ours shared", "trl orpo")
    assert suite.selected([item(trainer) for trainer in suite.TRAINERS]) == tuple(suite.TRAINERS)
