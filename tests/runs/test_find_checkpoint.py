"""Damaged checkpoints, records of other versions, clocks that are set back."""

import json
import re
import shutil
import zlib
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainers import make_trainer

import orpo.runs.record
from orpo.runs.checkpoints import complete_checkpoints
from orpo.runs.find_checkpoint import find_checkpoint
from orpo.runs.manifest import describe_files

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    make_trainer(folder, **SAVING).train()
    return folder


@pytest.fixture
def out(first_run, tmp_path):
    return shutil.copytree(first_run, tmp_path / "out")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("optimizer.pt", empty, r"checkpoint-4 has a optimizer.pt of 0 bytes, which was written with"),
        ("model.safetensors", cut, "checkpoint-4 has a model.safetensors of"),
        ("optimizer.pt", flip_a_bit, "checkpoint-4 has a optimizer.pt whose checksum is not that"),
        ("rng_state.pth", remove, "checkpoint-4 has lost rng_state.pth"),
        ("orpo_run.json", cut, r"checkpoint-4 has a record that is damaged \("),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(name, harm, message, out, capsys):
    harm(out / "checkpoint-4" / name)
    trainer = make_trainer(out, **SAVING)
    trainer.train("auto")
    assert trainer._initial_global_step == 2 and trainer.state.global_step == 4
    printed = capsys.readouterr().out
    assert f"resumes from {out}/checkpoint-2\n" in printed
    (line,) = [line for line in printed.splitlines() if "checkpoint-4" in line]
    assert re.search(message, line)
    # It was written again.
    assert [path.name for path in complete_checkpoints(out)] == ["checkpoint-2", "checkpoint-4"]


def test_a_damaged_record_does_not_keep_a_run_from_starting_anew(out):
    (out / "checkpoint-4/orpo_run.json").write_text('{"run": ')
    trainer = make_trainer(out, **{**SAVING, "max_steps": 2})
    trainer.train(resume_from_checkpoint=False)
    assert trainer._initial_global_step == 0


def test_a_damaged_checkpoint_asked_for_by_name_is_refused_with_the_whole_one(out):
    flip_a_bit(out / "checkpoint-4/model.safetensors")
    with pytest.raises(ValueError, match=f"whose checksum .*; {out}/checkpoint-2 is whole: --resume_from_checkpoint"):
        make_trainer(out, **SAVING).train(str(out / "checkpoint-4"))


def change_record(checkpoint, change):
    path = checkpoint / "orpo_run.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_settings_that_only_one_version_knows_are_not_compared(out, capsys):
    def of_another_version(record):
        record |= {"new_field": [1]}
        record["run"] |= {"new_setting": 3}
        del record["run"]["nll_weight"], record["run"]["max_steps"]

    change_record(out / "checkpoint-4", of_another_version)
    make_trainer(out, **{**SAVING, "max_steps": 5}).train("auto")
    assert f"resumes from {out}/checkpoint-4\n" in capsys.readouterr().out


def poison(checkpoint):
    """What a version without checks left after a step with a NaN."""
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"][3, 4] = torch.nan
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    change_record(checkpoint, lambda record: [record.pop(name) for name in ("files", "number")])


def test_a_newest_checkpoint_with_a_nan_names_the_older_one_which_is_gone_back_to_when_asked(out):
    poison(out / "checkpoint-4")
    change_record(out / "checkpoint-2", lambda record: [record.pop(name) for name in ("files", "number")])
    with pytest.raises(
        ValueError, match=r"checkpoint-4 has weights that are not finite \(lm_head.weight\); "
    ) as caught:
        make_trainer(out, **SAVING).train("auto")
    assert f"{out}/checkpoint-2 is whole: --resume_from_checkpoint {out}/checkpoint-2 goes on from" in str(caught.value)
    trainer = make_trainer(out, **SAVING)
    trainer.train(str(out / "checkpoint-2"))
    assert trainer._initial_global_step == 2
    assert torch.isfinite(load_file(out / "checkpoint-4/model.safetensors")["lm_head.weight"]).all()


def test_cut_weights_of_a_version_without_checksums_are_passed_over(out, capsys):
    for step in (2, 4):
        change_record(out / f"checkpoint-{step}", lambda record: [record.pop(name) for name in ("files", "number")])
    cut(out / "checkpoint-4/model.safetensors")
    make_trainer(out, **SAVING).train("auto")
    assert "checkpoint-4 has a model.safetensors that cannot be read" in (printed := capsys.readouterr().out)
    assert f"resumes from {out}/checkpoint-2\n" in printed


def cut_state(change):
    def harm(path):
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return harm


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("rng_state.pth", empty, "has a rng_state.pth that cannot be read"),
        ("optimizer.pt", cut, "has a optimizer.pt that cannot be read"),
        ("scheduler.pt", empty, "has a scheduler.pt that cannot be read"),
        (
            "trainer_state.json",
            cut_state(lambda state: []),
            "has a trainer_state.json that transformers .* cannot read",
        ),
        (
            "trainer_state.json",
            cut_state(lambda state: {}),
            "has a trainer_state.json that transformers .* cannot read",
        ),
        ("trainer_state.json", cut_state(lambda state: {**state, "of_a_newer_version": 1}), "cannot read"),
        ("trainer_state.json", lambda path: path.write_text("[" * 100_000), "was not written to its end"),
    ],
)
def test_a_damaged_checkpoint_of_another_program_is_passed_over_too(name, harm, message, out, capsys):
    for step in (2, 4):
        (out / f"checkpoint-{step}/orpo_run.json").unlink()
    harm(out / "checkpoint-4" / name)
    with pytest.raises(ValueError, match=f"checkpoint-4.*{message}"):
        find_checkpoint(out / "checkpoint-4", out)
    make_trainer(out, **SAVING).train("auto")
    printed = capsys.readouterr().out
    assert f"resumes from {out}/checkpoint-2 " in printed and re.search(message, printed)


def test_an_optimizer_that_would_not_be_loaded_is_no_way_to_resume(out):
    """Trainer takes up an optimizer's state only beside a schedule's."""
    for step in (2, 4):
        (out / f"checkpoint-{step}/orpo_run.json").unlink()
    (out / "checkpoint-4/scheduler.pt").unlink()
    with pytest.raises(ValueError, match=f"checkpoint-4 has no scheduler.pt, .*; {out}/checkpoint-2 is whole"):
        find_checkpoint(out / "checkpoint-4", out)


def test_a_record_that_is_nested_without_end_is_a_damaged_one(out):
    (out / "checkpoint-4/orpo_run.json").write_text("[" * 100_000)
    assert find_checkpoint("auto", out) == out / "checkpoint-2"


def test_a_clock_that_is_set_back_loses_nothing(tmp_path, monkeypatch):
    times = iter([9e3, 9.1e3, 9.2e3, *(2e3 + i for i in range(9))])
    monkeypatch.setattr(orpo.runs.record, "time", SimpleNamespace(time=lambda: next(times)))
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    make_trainer(tmp_path, **settings, max_steps=6).train()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-6"]
    trainer = make_trainer(tmp_path, **settings, max_steps=7)
    trainer.train("auto")
    assert trainer._initial_global_step == 6


def test_many_bytes_are_read_by_threads_to_the_same_checksums(first_run, monkeypatch):
    one = describe_files(first_run / "checkpoint-4", "orpo_run.json")
    monkeypatch.setattr("orpo.runs.manifest.SMALL", 0)
    assert describe_files(first_run / "checkpoint-4", "orpo_run.json") == one
    record = json.loads((first_run / "checkpoint-4/orpo_run.json").read_text())
    assert record["files"] == one and one.keys() >= {"model.safetensors", "optimizer.pt", "trainer_state.json"}
    content = (first_run / "checkpoint-4/optimizer.pt").read_bytes()
    assert one["optimizer.pt"] == {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}


@pytest.mark.parametrize("wrong", [{"number": "x"}, {"saved_at": None}, {"files": []}, {"files": {"optimizer.pt": {}}}])
def test_a_record_with_values_of_another_kind_is_a_damaged_one(wrong, out):
    record = out / "checkpoint-4" / "orpo_run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), **wrong}))
    assert find_checkpoint("auto", out) == out / "checkpoint-2"
    assert [path.name for path in complete_checkpoints(out)] == ["checkpoint-2"]


@pytest.mark.parametrize("state", ["[]", "3", "null", "{}", '{"global_step": "4"}'])
def test_a_state_that_is_no_state_is_a_damaged_checkpoint(state, out):
    for step in (2, 4):
        (out / f"checkpoint-{step}/orpo_run.json").unlink()
    (out / "checkpoint-4/trainer_state.json").write_text(state)
    assert find_checkpoint("auto", out) == out / "checkpoint-2"
    with pytest.raises(
        ValueError, match=r"checkpoint-4 has a trainer_state\.json that transformers .*checkpoint-2 is whole"
    ):
        find_checkpoint(str(out / "checkpoint-4"), out)
