"""A command that is interrupted, that nobody reads, or that would write over its sources."""

import io
import os
import shutil
import signal
import sys
import time

import pytest

from orpo import ORPOTrainer, train
from orpo.cli.errors import run_command
from orpo.runs.checkpoints import complete_checkpoints

pytestmark = pytest.mark.usefixtures("own_cache")


def options(files, **changes):
    chosen = {
        "model_name_or_path": files / "model",
        "dataset_name": files / "pairs.jsonl",
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "save_steps": 50,
        "use_cpu": True,
        **changes,
    }
    return [part for name, value in chosen.items() for part in (f"--{name}", str(value))]


def code_of(main):
    with pytest.raises(SystemExit) as stop:
        run_command("orpo-train", main)
    return stop.value.code


def test_sigterm_with_a_checkpoint_is_no_finished_run(files, tmp_path, monkeypatch, capsys):
    plain = ORPOTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 3:
            (manager,) = [c.jit_manager for c in self.callback_handler.callbacks if hasattr(c, "jit_manager")]
            manager.kill_wait = 0
            os.kill(os.getpid(), signal.SIGTERM)
            while not manager.is_checkpoint_requested:
                time.sleep(0.01)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(ORPOTrainer, "training_step", step)
    line = options(files, output_dir=tmp_path, enable_jit_checkpoint=True)
    assert code_of(lambda: train.main(line)) == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    assert "orpo-train: SIGTERM ended training after step 4 of 8, and no final model is written; " in said
    assert f"{tmp_path}/checkpoint-4 is whole, and the next start resumes from it" in said
    assert not list(tmp_path.glob("*.safetensors"))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-4"]
    monkeypatch.setattr(ORPOTrainer, "training_step", plain)
    run_command("orpo-train", lambda: train.main(line))
    assert f"resumes from {tmp_path}/checkpoint-4\n" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").is_file()


def test_weights_that_are_not_finite_end_the_command_without_a_model(files, tmp_path, capsys):
    line = options(files, output_dir=tmp_path, max_steps=1, learning_rate=1e39, save_strategy="no")
    assert code_of(lambda: train.main(line)) == 1
    assert "orpo-train: after step 1 the weights are not finite" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_output_without_an_encoding_for_all_characters_ends_nothing(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    run_command("orpo-train", lambda: print("caf\u00e9 \u2192"))
    assert written.getvalue() == b"caf\\xe9 \\u2192\n"


def deaf_stdout():
    """A pipe whose reader has ended."""
    read, write = os.pipe()
    os.close(read)
    return open(write, "w", encoding="utf-8")


def test_a_reader_that_ends_ends_the_command_without_a_word(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", deaf_stdout())
    assert code_of(lambda: print("first line", flush=True)) == 128 + signal.SIGPIPE
    assert not capsys.readouterr().err
    sys.stdout.close()


def test_a_command_that_is_done_is_done_though_nobody_reads(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", deaf_stdout())
    run_command("orpo-train", lambda: print("last line"))
    assert not capsys.readouterr().err
    sys.stdout.close()


def test_closed_outputs_end_nothing(monkeypatch):
    """What `orpo-train >&- 2>&-` has."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    # As progress bars write.
    run_command("orpo-train", lambda: (sys.stdout.write("a line"), sys.stderr.write("a line")))
    monkeypatch.setattr(sys, "stderr", None)
    assert code_of(lambda: open("no-such-file")) == 1


def test_ctrl_c_is_no_fault_of_the_program(capsys, monkeypatch):
    def main():
        error = KeyboardInterrupt()
        error.add_note("checkpoint-2 is whole")
        raise error

    assert code_of(main) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "\norpo-train: interrupted\ncheckpoint-2 is whole\n"
    monkeypatch.setenv("ORPO_TRACEBACK", "1")
    with pytest.raises(KeyboardInterrupt):
        run_command("orpo-train", main)


def test_another_broken_pipe_is_told(capsys):
    def main():
        raise BrokenPipeError("the tracker has gone")

    assert code_of(main) == 1
    assert "orpo-train: the tracker has gone" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_of_the_machine_is_told_with_what_needs_less(error, files, tmp_path, monkeypatch, capsys):
    def step(*_):
        raise error

    monkeypatch.setattr(ORPOTrainer, "training_step", step)
    assert code_of(lambda: train.main(options(files, output_dir=tmp_path))) == 1
    said = capsys.readouterr().err
    assert f"orpo-train: {error}" in said and "out of memory; what needs less: per_device_train_batch_size 1" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": "model"}, "where the model .*model lies"),
        ({"output_dir": "link"}, "where the model .*model lies"),
        ({"output_dir": ".", "model_name_or_path": "merged", "use_peft": True, "merge_adapter": True}, "the model"),
        ({"output_dir": ".", "model_name_or_path": "checkpoint-3"}, "write over or remove"),
        ({"output_dir": "data", "dataset_name": "data"}, "where the pairs .*data lie"),
        ({"output_dir": "data/out", "dataset_name": "data"}, "where the pairs .*data lie"),
        ({"output_dir": ".", "dataset_name": "samples.jsonl"}, "where the pairs .*samples.jsonl lie"),
        ({"output_dir": ".", "eval_dataset_name": "samples.jsonl"}, "where the pairs .*samples.jsonl lie"),
    ],
    ids=[
        "model",
        "link to model",
        "merged",
        "own checkpoint",
        "data",
        "below data",
        "file that is written",
        "held-out file",
    ],
)
def test_what_a_run_is_made_from_is_not_written_over(changes, message, files, tmp_path):
    for name in ("model", "merged", "checkpoint-3"):
        shutil.copytree(files / "model", tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for path in (tmp_path / "data/train.jsonl", tmp_path / "samples.jsonl"):
        shutil.copy(files / "pairs.jsonl", path)
    places = {"model_name_or_path": "model", **changes}
    places = {name: tmp_path / value if isinstance(value, str) else value for name, value in places.items()}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=message):
        train.main(options(files, **places))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_pairs_under_another_name_may_lie_in_the_folder(files, tmp_path):
    shutil.copy(files / "pairs.jsonl", tmp_path / "pairs.jsonl")
    train.main(options(files, output_dir=tmp_path, dataset_name=tmp_path / "pairs.jsonl", max_steps=1))
    assert (tmp_path / "pairs.jsonl").read_text() == (files / "pairs.jsonl").read_text()
