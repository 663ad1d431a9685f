"""Runs that are killed, and what is left of them; full disks; settings that changed."""

import errno
import json
import os
import shutil
import subprocess

import peft
import pytest
import torch
from run_checkpoints import KILLED, start
from run_ranks import EIGHT
from safetensors.torch import load_file
from tiny import SEVEN, make_model, make_tokenizer
from trainers import logged, make_args, make_trainer
from transformers import AutoModelForCausalLM

from orpo import ORPOTrainer
from orpo.runs.disk import check_writable, checkpoint_bytes
from orpo.runs.find_checkpoint import complete_checkpoints
from orpo.runs.record import compare_runs, write_record

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
WAYS = {
    "one": {},
    "ddp": {"ranks": 2},
    "fsdp2": {"ranks": 2, "sharded": "FULL_STATE_DICT"},
    "fsdp2-sharded": {"ranks": 2, "sharded": "SHARDED_STATE_DICT"},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of each way to its end, made when it is first asked for."""
    runs = {}

    def of(way):
        if way not in runs:
            folder = tmp_path_factory.mktemp(way)
            codes, seen, _ = start(folder, **WAYS[way])
            assert not any(codes)
            runs[way] = folder / "out", seen
        return runs[way]

    return of


@pytest.mark.parametrize("kill", ["training", "save"])
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(way, kill, tmp_path, uninterrupted):
    whole, expected = uninterrupted(way)
    codes, _, _ = start(tmp_path, kill=kill, **WAYS[way])
    assert codes[-1] == KILLED
    left = {"training": 4, "save": 2}[kill]
    assert [path.name for path in complete_checkpoints(tmp_path / "out")] == [f"checkpoint-{left}"]
    codes, seen, printed = start(tmp_path, resume="auto", **WAYS[way])
    assert not any(codes)
    assert f"resumes from {tmp_path / 'out'}/checkpoint-{left}\n" in printed
    # Where another process lives to see the end, it removes what there was of the checkpoint itself.
    if (way, kill) == ("one", "save"):
        assert "the save of checkpoint-4 was interrupted" in printed
    assert seen["first_step"] == left and len(seen["losses"]) == 6
    assert seen["losses"] == expected["losses"]
    assert (seen["sharded"] > 0) == way.startswith("fsdp2")
    assert not (tmp_path / "out/_incomplete").exists()
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", whole))
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name


@pytest.mark.parametrize(
    "setting",
    [
        {"normalization": "micro_batch"},
        {"train_sampling_strategy": "group_by_length"},
        {"auto_find_batch_size": True},
        {"dataloader_drop_last": True},
        {"train_dataset": "a stream"},
        {"fsdp or deepspeed": "ZeRO-2"},
        {},
    ],
    ids=lambda setting: next(iter(setting), "any other"),
)
def test_where_the_division_of_pairs_decides_the_losses_it_is_a_setting(setting, tmp_path):
    run = {
        **{"normalization": "global", "train_sampling_strategy": "random", "train_dataset": "8 pairs"},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "world_size": 1, **setting},
    }
    write_record(tmp_path, run, 1)
    other = {**run, "gradient_accumulation_steps": 1, "world_size": 2}
    if not setting:
        assert compare_runs(tmp_path, other).endswith("a step has the same 4 pairs)")
        return
    with pytest.raises(ValueError, match=r"accumulation_steps was 2 and is 1; world_size was 1 and is 2\. Give"):
        compare_runs(tmp_path, other)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"ranks": 2, "gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 4}),
        ({"gradient_accumulation_steps": 4}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
        (
            {"ranks": 2, "sharded": "SHARDED_STATE_DICT", "gradient_accumulation_steps": 2},
            {"ranks": 4, "sharded": "SHARDED_STATE_DICT", "gradient_accumulation_steps": 1},
        ),
    ],
    ids=["ddp to one", "other batches", "sharded, 2 to 4"],
)
def test_a_run_goes_on_with_its_pairs_dealt_out_otherwise(before, after, tmp_path):
    # Where the last step of an epoch is not full, ranks repeat rows.
    plain = {"disable_dropout": True, "save_total_limit": 3, "train_dataset": EIGHT}
    codes, whole, _ = start(tmp_path / "whole", **before, **plain)
    assert not any(codes)
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "whole/out/checkpoint-2", tmp_path / "other/out/checkpoint-2")
    codes, seen, printed = start(tmp_path / "other", resume="auto", **after, **plain)
    assert not any(codes), printed
    assert "a step has the same 4 pairs" in printed and seen["first_step"] == 2
    assert seen["losses"] == {step: pytest.approx(loss, rel=2e-5) for step, loss in whole["losses"].items()}


@pytest.mark.parametrize("way", WAYS)
def test_a_whole_model_is_exported_with_its_ties(way, uninterrupted):
    folder, seen = uninterrupted(way)
    model, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert not torch.equal(model.lm_head.weight, make_model("llama", tie_word_embeddings=True).lm_head.weight)
    # Every way trains the same steps; dropout draws differently on every rank.
    assert seen["losses"]["1"] == pytest.approx(uninterrupted("ddp" if way != "one" else way)[1]["losses"]["1"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.5}, "beta was 0.1 and is 0.5"),
        ({"seed": 7, "learning_rate": 1e-4}, "learning_rate was 0.001 and is 0.0001; seed was 42 and is 7"),
        (
            {"per_device_train_batch_size": 2},
            r"size was 4 and is 2. Give what it was \(gradient_accumulation_steps 2 makes it the 4 pairs a step",
        ),
        (
            {"gradient_accumulation_steps": 2},
            r"steps was 1 and is 2. Give what it was \(gradient_accumulation_steps 1 makes it the 4 pairs a step",
        ),
        ({"train_dataset": {k: v[::-1] for k, v in SEVEN.items()}}, "train_dataset was 7 pairs .* and is 7 pairs"),
        # Columns mixed up: every pair is as long as it was.
        (
            {"train_dataset": {**SEVEN, "chosen": SEVEN["rejected"], "rejected": SEVEN["chosen"]}},
            r"train_dataset was 7 pairs \(\w+\) and is 7 pairs",
        ),
        (
            {"max_length": 90, "max_prompt_length": 50, "max_completion_length": 60, "truncation_mode": "keep_start"},
            "max_length was 1024 and is 90; max_prompt_length was None and is 50; "
            "max_completion_length was None and is 60; truncation_mode was keep_end and is keep_start",
        ),
        ({"model": make_model("llama", num_hidden_layers=1)}, "model was llama of .* and is llama of"),
        ({"model": make_model("llama").bfloat16()}, "dtype of the model was float32 and is bfloat16"),
        ({"peft_config": peft.LoraConfig(r=2)}, "lora_alpha of the adapter was None and is 8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_run_with_other_settings_is_refused_in_words(changes, message, tmp_path, first_run):
    with pytest.raises(ValueError, match=message) as caught:
        make_trainer(first_run, **{**SAVING, **changes}).train(resume_from_checkpoint="auto")
    assert "resume_from_checkpoint false" in str(caught.value) and "checkpoint-4 is of another run" in str(caught.value)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    make_trainer(folder, **SAVING).train()
    return folder


def test_the_number_of_processes_is_a_setting(first_run, tmp_path, capsys):
    shutil.copytree(first_run, tmp_path / "out")
    record = tmp_path / "out/checkpoint-4/orpo_run.json"
    record.write_text(record.read_text().replace('"world_size": 1', '"world_size": 8'))
    with pytest.raises(ValueError, match=r"world_size was 8 and is 1.*gradient_accumulation_steps 8 makes it the 32"):
        make_trainer(tmp_path / "out", **SAVING).train(resume_from_checkpoint=True)
    # The record of another program is not there at all.
    record.unlink()
    (tmp_path / "out/checkpoint-2").rename(tmp_path / "two")
    make_trainer(tmp_path / "out", **SAVING).train(resume_from_checkpoint=True)
    assert "resumes from" in (out := capsys.readouterr().out) and "were not compared" in out


def test_harmless_settings_may_change_and_a_longer_run_is_said_to_differ(first_run, tmp_path, capsys):
    shutil.copytree(first_run, tmp_path / "out")
    changes = {"logging_steps": 2, "save_steps": 1, "max_steps": 5, "gradient_checkpointing": False}
    trainer = make_trainer(tmp_path / "out", **{**SAVING, **changes})
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 5 and (tmp_path / "out/checkpoint-5").is_dir()
    printed = capsys.readouterr().out
    assert "max_steps was 4 and is 5: from here on the learning rate is that of the new length" in printed


def test_a_run_that_starts_anew_has_the_newest_checkpoint(first_run, tmp_path, capsys):
    shutil.copytree(first_run, tmp_path / "out")
    make_trainer(tmp_path / "out", **{**SAVING, "max_steps": 2}).train()
    assert "starts anew" in capsys.readouterr().out
    names = [path.name for path in complete_checkpoints(tmp_path / "out")]
    assert names == ["checkpoint-4", "checkpoint-2"]
    make_trainer(tmp_path / "out", **{**SAVING, "max_steps": 3, "save_total_limit": 1}).train("auto")
    assert "checkpoint-2 (max_steps was 2" in capsys.readouterr().out
    assert [path.name for path in complete_checkpoints(tmp_path / "out")] == ["checkpoint-3"]


def test_an_interrupted_folder_of_another_program_is_ignored_and_not_counted(tmp_path, capsys):
    settings = {**SAVING, "save_total_limit": 2}
    make_trainer(tmp_path, **settings).train()
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9/trainer_state.json").write_text('{"half": ')
    trainer = make_trainer(tmp_path, **{**settings, "max_steps": 6})
    trainer.train(resume_from_checkpoint="auto")
    assert trainer._initial_global_step == 4
    assert "checkpoint-9 was not written to its end and is ignored" in capsys.readouterr().out
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]


def test_a_checkpoint_that_trainer_calls_incomplete_is_none(first_run, tmp_path):
    shutil.copytree(first_run, tmp_path / "out")
    (tmp_path / "out/checkpoint-4/checkpoint-is-incomplete.txt").touch()
    # Ours is written last, and only when all is there.
    (tmp_path / "out/checkpoint-4/orpo_run.json").unlink()
    assert [path.name for path in complete_checkpoints(tmp_path / "out")] == ["checkpoint-2"]


def test_the_best_checkpoint_is_kept_by_its_final_name(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    settings = {**SAVING, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1, **best}
    trainer = make_trainer(tmp_path, eval_dataset=SEVEN, **{**settings, "max_steps": 6})
    trainer.train()
    # The loss falls, and more is said to be better: the first one stays, and the last, which says that the run ended.
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-6"]
    state = json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")


def test_the_model_alone_cannot_be_resumed(tmp_path):
    make_trainer(tmp_path, **SAVING, save_only_model=True).train()
    with pytest.raises(ValueError, match="checkpoint-4 holds the model alone"):
        make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint="auto")


def test_a_run_of_one_command_repeated_resumes_from_a_folder_too(first_run, tmp_path):
    trainer = make_trainer(tmp_path, **{**SAVING, "max_steps": 5})
    trainer.train(resume_from_checkpoint=str(first_run))
    assert trainer._initial_global_step == 4 and len(logged(trainer, "loss")) == 5


def test_the_size_of_a_checkpoint_is_told_before(first_run, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **SAVING)
    there = sum(path.stat().st_size for path in (first_run / "checkpoint-4").glob("[mo]*.[sp]*"))
    assert checkpoint_bytes(trainer.model, trainer.args) == pytest.approx(there, rel=0.05)
    alone = make_trainer(tmp_path, **SAVING, save_only_model=True).args
    weights = (first_run / "checkpoint-4/model.safetensors").stat().st_size
    assert checkpoint_bytes(trainer.model, alone) == pytest.approx(weights, rel=0.05)

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(ValueError, match=r"has 100.0 kB free, and a checkpoint takes about \d+\.\d kB"):
        trainer.train()
    assert trainer.state.global_step == 0 and not list(tmp_path.glob("checkpoint-*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(1.5 * there)))
    with pytest.warns(UserWarning, match=r"kB free, and 2 checkpoints take about .* set save_total_limit"):
        trainer.train()


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir .*file/out cannot be written: Not a directory"):
        make_trainer(tmp_path / "file/out", model="no-such-model")
    check_writable(tmp_path / "new/folder")
    assert list((tmp_path / "new/folder").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 0.9 MB, room for one checkpoint but not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=900k", "none", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"may not mount a small disk: {done.stderr.strip()}")
    yield folder
    # Lazy: the trainer of the failed save may not be collected yet, and holds its files open.
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.filterwarnings("ignore:output_dir")
def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_so(small_disk, tmp_path):
    trainer = make_trainer(small_disk, **SAVING)
    with pytest.raises((OSError, RuntimeError)) as caught:
        trainer.train()
    (note,) = caught.value.__notes__
    assert "checkpoint-4 could not be saved" in note and "checkpoint-2 is whole, and the run resumes from it" in note
    assert sorted(path.name for path in small_disk.iterdir() if path.is_dir()) == ["_incomplete", "checkpoint-2"]
    assert not list((small_disk / "_incomplete").iterdir())
    shutil.copytree(small_disk, tmp_path / "larger")
    resumed = make_trainer(tmp_path / "larger", **SAVING)
    resumed.train(resume_from_checkpoint="auto")
    whole = make_trainer(tmp_path / "whole", **SAVING)
    whole.train()
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_a_save_that_fails_leaves_nothing_of_itself(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **SAVING)

    def full(output_dir):
        assert os.path.exists(os.path.join(output_dir, "optimizer.pt"))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer, "_save_rng_state", full)
    with pytest.raises(OSError, match="No space left") as caught:
        trainer.train()
    assert "checkpoint-2 could not be saved" in caught.value.__notes__[0]
    assert "there is none before it" in caught.value.__notes__[0]
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_an_adapter_goes_on_where_its_base_lies_elsewhere_now(tmp_path):
    for folder in ("base", "moved"):
        make_model("llama").save_pretrained(tmp_path / folder)
        make_tokenizer().save_pretrained(tmp_path / folder)
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for folder, steps in (("base", 2), ("moved", 4)):
        args = make_args(tmp_path / "out", **{**SAVING, "max_steps": steps, "lr_scheduler_type": "constant"})
        trainer = ORPOTrainer(str(tmp_path / folder), args, train_dataset=SEVEN, peft_config=adapter)
        trainer.train("auto")
    assert trainer.state.global_step == 4


def test_an_adapter_does_not_go_on_around_another_base_of_the_same_shape(tmp_path):
    def run(seed, steps):
        adapter = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="pissa")
        settings = {**SAVING, "max_steps": steps, "layout": "padded", "peft_config": adapter}
        trainer = make_trainer(tmp_path, make_model("llama", seed=seed), **settings)
        trainer.train("auto")
        return trainer._initial_global_step

    assert (run(0, 2), run(0, 3)) == (0, 2)
    with pytest.raises(ValueError, match="base model's weights of the adapter was"):
        run(1, 4)


def test_what_an_older_save_of_the_same_step_has_left_is_no_part_of_the_next(tmp_path):
    part = tmp_path / "_incomplete" / "checkpoint-2"
    part.mkdir(parents=True)
    (part / "optimizer-of-before.pt").write_text("half of it")
    make_trainer(tmp_path, **SAVING).train()
    assert not list(tmp_path.rglob("optimizer-of-before.pt"))
