"""Who writes in a folder, who may, and what is not removed."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import time

import pytest
from accelerate import PartialState
from trainers import make_trainer

from orpo.runs import lock
from orpo.runs.lock import LOCK, _me, _started, check_lock, run_lock

SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}


def owned_by(folder, pid, host=None, started=None):
    owner = {"pid": pid, "started": started or _started(pid), "host": host or socket.gethostname()}
    (folder / LOCK).write_text(json.dumps(owner))


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_before_it_removes_anything(tmp_path, sleeper):
    part = tmp_path / "_incomplete/checkpoint-2"
    part.mkdir(parents=True)
    (part / "orpo_run.json").write_text("{}")
    owned_by(tmp_path, sleeper.pid)
    with pytest.raises(ValueError, match=f"{tmp_path} is in use by process {sleeper.pid}: wait for its end, or give"):
        make_trainer(tmp_path, **SAVING).train()
    assert part.is_dir() and (tmp_path / LOCK).is_file()


def test_a_lock_whose_process_has_ended_is_taken_over_and_given_back(tmp_path, sleeper):
    owned_by(tmp_path, sleeper.pid)
    os.kill(sleeper.pid, signal.SIGKILL)
    while _started(sleeper.pid):
        time.sleep(0.01)
    # A zombie: nobody has asked how it ended.
    assert sleeper.returncode is None
    make_trainer(tmp_path, **SAVING).train()
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("left", ["", "{}", None], ids=["empty", "no owner", "another process had its number"])
def test_a_lock_that_nobody_can_hold_is_taken_over(left, tmp_path, sleeper):
    owned_by(tmp_path, sleeper.pid, started=1)
    if left is not None:
        (tmp_path / LOCK).write_text(left)
    with run_lock(tmp_path, PartialState(cpu=True)):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_of_another_host_says_how_it_is_removed(tmp_path):
    folder = tmp_path / "my runs"
    folder.mkdir()
    # On a file system whose times cannot be set.
    owned_by(folder, 7, host="node-3", started=1)
    with pytest.raises(ValueError, match=f"in use by process 7 on node-3: .* rm '{folder}/{LOCK}'"):
        make_trainer(folder, **SAVING).train()
    # Nothing is saved that could be mixed.
    make_trainer(folder, max_steps=1).train()


ELSEWHERE = [{"host": "node-3"}, {"namespace": "pid:[1]"}]


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr("orpo.runs.lock.BEAT", 0.1)
    monkeypatch.setattr("orpo.runs.lock.SILENCE", 1.5)


def locked_elsewhere(folder, where):
    (folder / LOCK).write_text(json.dumps({**_me(), "pid": 7, "started": 1, "beats": True, **where}))


@pytest.mark.parametrize("where", ELSEWHERE, ids=["host", "container"])
def test_a_lock_from_elsewhere_is_taken_over_once_nothing_touches_it(where, tmp_path, hasty, capsys):
    """A run that was killed with its host, and is queued again on another."""
    locked_elsewhere(tmp_path, where)
    # Its host's clock is of no matter.
    os.utime(tmp_path / LOCK, (2e9, 2e9))
    with run_lock(tmp_path, PartialState(cpu=True)):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert "was left locked by process 7 on" in capsys.readouterr().out


def test_a_lock_that_is_touched_between_the_silence_and_its_end_is_waited_for_again(tmp_path, hasty, monkeypatch):
    locked_elsewhere(tmp_path, {"host": "node-3"})
    waits, wait = [], lock._wait_for_silence

    def touched_after(folder, *owners):
        waits.append(wait(folder, *owners))
        if len(waits) == 1:
            os.utime(folder / LOCK, (5, 5))
        return waits[-1]

    monkeypatch.setattr(lock, "_wait_for_silence", touched_after)
    with run_lock(tmp_path, PartialState(cpu=True)):
        assert len(waits) == 2 and waits[1] == 5 * 10**9


@pytest.mark.parametrize("where", ELSEWHERE, ids=["host", "container"])
def test_a_lock_from_elsewhere_that_is_touched_is_held(where, tmp_path, hasty):
    locked_elsewhere(tmp_path, where)
    toucher = subprocess.Popen(["sh", "-c", f"while sleep 0.3; do touch {tmp_path}/{LOCK}; done"])
    try:
        with pytest.raises(ValueError, match=f"in use by process 7.* rm {tmp_path}/{LOCK}"):
            make_trainer(tmp_path, **SAVING).train()
    finally:
        toucher.kill()
        toucher.wait()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == 7


def test_a_run_touches_its_lock_until_it_ends(tmp_path, hasty):
    with run_lock(tmp_path, PartialState(cpu=True)):
        for _ in range(2):
            os.utime(tmp_path / LOCK, (1, 1))
            limit = time.monotonic() + 30
            while (tmp_path / LOCK).stat().st_mtime == 1 and time.monotonic() < limit:
                time.sleep(0.02)
            assert (tmp_path / LOCK).stat().st_mtime > 1
        # Taken over while this process was stopped: it is left alone.
        locked_elsewhere(tmp_path, {"host": "node-3"})
        os.utime(tmp_path / LOCK, (1, 1))
        time.sleep(0.5)
        assert (tmp_path / LOCK).stat().st_mtime == 1
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == 7


def test_a_run_whose_lock_was_taken_over_saves_no_more(tmp_path):
    trainer = make_trainer(tmp_path, **{**SAVING, "save_steps": 1})
    plain = trainer.training_step

    def step(*args, **kwargs):
        if trainer.state.global_step == 1:
            locked_elsewhere(tmp_path, {"host": "node-3"})
        return plain(*args, **kwargs)

    trainer.training_step = step
    with pytest.raises(ValueError, match="in use by process 7 on node-3"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == 7
    # Who never had it is not asked.
    check_lock(tmp_path)


def test_one_process_may_hold_it_twice_by_two_names(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with run_lock(tmp_path / "out", PartialState(cpu=True)):
        with run_lock(tmp_path / "link", PartialState(cpu=True)):
            pass
        assert (tmp_path / "out" / LOCK).exists()
    assert not (tmp_path / "out" / LOCK).exists()


def test_one_process_may_hold_it_twice(tmp_path):
    with run_lock(tmp_path, PartialState(cpu=True)):
        make_trainer(tmp_path, **SAVING).train()
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_an_error_gives_it_back(tmp_path):
    with pytest.raises(KeyError), run_lock(tmp_path, PartialState(cpu=True)):
        raise KeyError
    assert not (tmp_path / LOCK).exists()


def take(folder, start, answers):
    start.wait()
    try:
        with run_lock(folder, PartialState(cpu=True)):
            answers.put("had it")
            time.sleep(3)
    except ValueError:
        answers.put("refused")


def test_of_many_that_find_the_same_dead_lock_one_has_it(tmp_path):
    owned_by(tmp_path, 2**22 + 1, started=1)
    context = multiprocessing.get_context("fork")
    start, answers = context.Event(), context.Queue()
    children = [context.Process(target=take, args=(tmp_path, start, answers)) for _ in range(6)]
    for child in children:
        child.start()
    start.set()
    seen = [answers.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert sorted(seen) == ["had it", *["refused"] * 5]


def test_what_a_user_keeps_under_the_same_name_stays(tmp_path, capsys):
    own = tmp_path / "_incomplete"
    for path in (own / "notes.txt", own / "checkpoint-7/notes.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    part = own / "checkpoint-4"
    part.mkdir()
    (part / "orpo_run.json").write_text("{}")
    make_trainer(tmp_path, **SAVING).train()
    assert "the save of checkpoint-4 was interrupted" in capsys.readouterr().out
    assert sorted(path.name for path in own.rglob("*")) == ["checkpoint-7", "notes.txt", "notes.txt"]


def test_a_run_that_is_refused_removes_nothing(tmp_path):
    make_trainer(tmp_path, **SAVING).train()
    part = tmp_path / "_incomplete/checkpoint-4"
    part.mkdir(parents=True)
    (part / "orpo_run.json").write_text("{}")
    with pytest.raises(ValueError, match="beta was"):
        make_trainer(tmp_path, **SAVING, beta=0.5).train("auto")
    assert part.is_dir()


def test_a_process_that_cannot_be_seen_holds_its_own_lock_twice(tmp_path, monkeypatch):
    """Where /proc is missing: a command holds the lock around the trainer's own."""
    monkeypatch.setattr("orpo.runs.lock._started", lambda pid: None)
    with run_lock(tmp_path, PartialState()):
        with run_lock(tmp_path, PartialState()):
            assert (tmp_path / LOCK).is_file()
        assert (tmp_path / LOCK).is_file()
    assert not (tmp_path / LOCK).exists()
