"""python -m benchmarks.run: what it would ignore, or store as a failure, is refused in words."""

import pytest

from benchmarks import run


@pytest.fixture
def command(monkeypatch):
    """The command line, which measures nothing here: what it would measure, it notes."""
    calls = []
    monkeypatch.setattr(run, "measure", lambda group, piece, names: calls.append((group, str(piece), names)))
    monkeypatch.setattr(run, "is_measured", lambda *_: False)
    monkeypatch.setattr(run, "available", lambda name: True)
    for name in ("training.run", "accuracy.run", "limits.run"):
        monkeypatch.setattr(f"benchmarks.{name}", lambda *a, name=name, **k: calls.append((name, *a, *k)))
    monkeypatch.delenv("ORPO_BENCH_MODEL", raising=False)

    def call(*options):
        calls.clear()
        monkeypatch.setattr("sys.argv", ["run", *options])
        run.main()
        return list(calls)

    return call


@pytest.mark.parametrize(
    "options,said",
    [
        (["training", "--only", "float32"], "--only would be ignored: it is for groups of pieces, and training has"),
        (["accuracy", "--again"], "--again would be ignored"),
        (["long", "--pieces", "1"], "--pieces would be ignored"),
        (["heads", "--model", "x"], "--model would be ignored: heads measures random hidden states"),
        (["growth", "--data", "x"], "--data would be ignored"),
        (["long", "--model", "x"], "--model and --data would be ignored: long measures"),
        (["training", "--peers", "ours"], "--peers would be ignored: training has trainers of its own"),
        (["accuracy", "--data", "x"], "--data goes with --model"),
        (["heads", "--only", "float64"], "--only 'float64' is in no line of heads"),
        (["heads", "--pieces", "0"], "--pieces is 0; it is at least 1"),
        (["long", "--pieces", "0"], "--pieces would be ignored"),
        (["heads", "--list", "--again"], "--again would be ignored: a list measures nothing"),
        (["heads", "--peers", "ours,mine"], "--peers names 'mine'; there are ours, "),
    ],
)
def test_what_would_be_ignored_is_refused(command, capsys, options, said):
    with pytest.raises(SystemExit):
        command("--group", *options)
    assert said in capsys.readouterr().err


def test_a_group_that_was_forgotten_is_no_reason_to_list_and_ignore(command, capsys):
    with pytest.raises(SystemExit):
        command("--only", "float32", "--again")
    assert "--again would be ignored: a list measures nothing" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--only", "banana"], ["--list", "--group", "long", "--only", "banana"]])
def test_a_list_of_nothing_is_refused(command, capsys, options):
    with pytest.raises(SystemExit):
        command(*options)
    assert "--only 'banana' is in no line of" in capsys.readouterr().err


def test_a_list_is_of_what_is_asked_for(command, capsys):
    assert command("--list", "--group", "heads", "--only", "Phi-2") == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("heads") and "Phi-2" in line for line in lines)
    command()
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == set(run.GROUPS)


def test_a_peer_that_is_not_installed_is_refused(command, monkeypatch, capsys):
    monkeypatch.setattr(run, "available", lambda name: name != "cce")
    with pytest.raises(SystemExit):
        command("--group", "heads", "--peers", "ours,cce")
    assert "--peers names cce, not installed here" in capsys.readouterr().err
    # Nobody asked for it by name: what is there is measured.
    (_, _, names), *_ = command("--group", "heads")
    assert "ours" in names and "cce" not in names


def test_the_model_is_that_of_the_option_or_of_the_environment(command, monkeypatch):
    assert command("--group", "training") == [("training.run", None, None), ("training.run", None, "shares")]
    monkeypatch.setenv("ORPO_BENCH_MODEL", "env")
    assert command("--group", "training")[1] == ("training.run", "env", "shares")
    assert command("--group", "training", "--model", "own")[0] == ("training.run", "own", None)
    (name, _, *rest) = command("--group", "accuracy", "--data", "pairs")[0]
    assert (name, rest) == ("accuracy.run", ["env", "pairs"])
    # The variable is for other groups, and no reason to refuse this one.
    ((name, peers),) = command("--group", "long", "--peers", "ours,trl")
    assert (name, peers) == ("limits.run", ["ours", "trl"])
    assert command("--group", "growth", "--pieces", "2")


def test_only_what_is_asked_for_and_not_measured_is_measured(command, monkeypatch, capsys):
    calls = command("--group", "heads", "--only", "Phi-2", "--peers", "ours,trl")
    assert [(group, names) for group, _, names in calls] == [("heads", ["ours", "trl"])] * 2
    assert all("Phi-2" in piece for _, piece, _ in calls)
    monkeypatch.setattr(run, "is_measured", lambda *_: True)
    assert command("--group", "heads") == [] and "--again measures it anew" in capsys.readouterr().out
    assert len(command("--group", "heads", "--again", "--pieces", "3")) == 3
