"""orpo.runs.async_saves: checkpoints in shards that are written while training goes on."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, merge_fsdp_weights
from run_async_saves import end_while_writing, run, time_saves, write_while_training_goes_on
from run_forked import launch, returned
from safetensors.torch import load_file
from torch.distributed.fsdp import StateDictType
from trainers import make_trainer

from orpo.runs.async_saves import refuse_async_save
from orpo.runs.find_checkpoint import complete_checkpoints, find_fault

ASYNC = {"async_save": True}
# They hold times, the folder's name and settings.
NOT_COMPARED = {"trainer_state.json", "training_args.bin"}


@pytest.fixture(scope="module")
def waited(tmp_path_factory):
    """(folder, what rank 0 saw) of a run that waits for its saves."""
    folder = tmp_path_factory.mktemp("waited")
    return folder, returned(run, 2, folder, {})[0]


@pytest.fixture(scope="module")
def went_on(tmp_path_factory):
    """The same of one that does not."""
    folder = tmp_path_factory.mktemp("went-on")
    return folder, returned(run, 2, folder, ASYNC)[0]


def assert_same_end(one, other):
    assert one["losses"] == other["losses"] and one["step"] == other["step"]
    for name, weight in one["weights"].items():
        assert torch.equal(other["weights"][name], weight), name


def checksums(checkpoint):
    """Of every file of it, by the record; torch's list of shards by what it says, since it names the save."""
    files = json.loads((checkpoint / "orpo_run.json").read_text())["files"]
    return {name: value for name, value in files.items() if name.rpartition("/")[2] not in {*NOT_COMPARED, ".metadata"}}


def assert_same_checkpoint(one, other):
    assert find_fault(one, contents=True) is None and find_fault(other, contents=True) is None
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*")) for root in (one, other)]
    assert names[0] == names[1] and "pytorch_model_fsdp_0/__1_0.distcp" in names[0] and "optimizer_0" in names[0]
    assert checksums(one) == checksums(other)
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        a, b = (torch.distributed.checkpoint.FileSystemReader(root / part).read_metadata() for root in (one, other))
        assert a.state_dict_metadata == b.state_dict_metadata and a.planner_data == b.planner_data


def test_a_checkpoint_is_the_one_that_training_would_have_waited_for(waited, went_on, tmp_path):
    for step in (2, 4, 6):
        assert_same_checkpoint(*(folder / "out" / f"checkpoint-{step}" for folder, _ in (waited, went_on)))
    assert_same_end(waited[1], went_on[1])
    assert went_on[1]["left"] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    # As a model for other programs: what was in memory at the end.
    merge_fsdp_weights(str(went_on[0] / "out/checkpoint-6/pytorch_model_fsdp_0"), str(tmp_path))
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(weight, went_on[1]["weights"][name]), name


def test_so_it_is_of_an_adapter(tmp_path):
    lora = {"lora": {"target_modules": ["q_proj", "v_proj"]}, "max_steps": 2}
    for name, way in (("waited", {}), ("went-on", ASYNC)):
        returned(run, 2, tmp_path / name, {**lora, **way})
    assert_same_checkpoint(*(tmp_path / name / "out/checkpoint-2" for name in ("waited", "went-on")))


def test_training_goes_on_up_to_the_next_save_while_one_is_written(tmp_path, waited):
    for seen in returned(write_while_training_goes_on, 2, tmp_path, 3.0):
        assert seen["reached"] == seen["still at"] == 4
        assert seen["complete"] == [] and seen["at end"] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    # Written after two more steps, it is what there was at its own.
    assert_same_checkpoint(*(folder / "out/checkpoint-2" for folder in (waited[0], tmp_path)))


def test_a_slow_disk_does_not_keep_the_step(tmp_path):
    waits = {
        name: max(returned(time_saves, 2, tmp_path / name, way, 3.0))[0]
        for name, way in (("waited", {}), ("went-on", ASYNC))
    }
    assert waits["waited"] > 3 and waits["went-on"] < 2, waits


@pytest.mark.parametrize("place", ["kill shards 4", "kill record 4"])
def test_a_run_that_is_killed_while_it_writes_goes_on_from_the_checkpoint_before(place, tmp_path, waited):
    ends = launch(run, 2, tmp_path, ASYNC, place)
    assert ends[-1 if "shards" in place else 0][0] == -9, ends
    assert [path.name for path in complete_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert not (tmp_path / "out/checkpoint-4").exists()
    seen = launch(run, 2, tmp_path, ASYNC, None, "auto")
    assert not any(error for *_, error in seen), seen[0][-1]
    assert f"resumes from {tmp_path / 'out'}/checkpoint-2\n" in seen[0][2]
    for _, mine, *_ in seen:
        assert min(mine["losses"]) == 1 and mine["left"] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
        assert_same_end(waited[1], mine)


@pytest.mark.parametrize("place", ["fail shards 4", "fail record 4"])
def test_an_error_of_the_writing_ends_the_run_on_all_ranks(place, tmp_path):
    rank = 1 if "shards" in place else 0
    for seen in returned(run, 2, tmp_path, ASYNC, place):
        assert seen["error"].startswith(
            "AsyncSaveError\ncheckpoint-4 could not be written while training went on: "
            f"rank {rank}: OSError: [Errno 28] No space left on device\n"
        )
        assert f"{tmp_path / 'out'}/checkpoint-2 is whole, and the run resumes from it" in seen["error"]
        assert seen["complete"] == ["checkpoint-2"] and seen["step"] in (5, 6)
        assert not (tmp_path / "out/_incomplete/checkpoint-4").exists()


def test_an_error_of_the_last_save_is_not_lost(tmp_path):
    for seen in returned(run, 2, tmp_path, ASYNC, "fail shards 6"):
        assert "checkpoint-6 could not be written" in seen["error"] and "Errno 28" in seen["error"]
        assert seen["complete"] == ["checkpoint-2", "checkpoint-4"]


def test_older_checkpoints_are_removed_only_when_the_new_one_is_whole(tmp_path):
    limited = {**ASYNC, "save_total_limit": 1}
    launch(run, 2, tmp_path, limited, "kill record 4")
    assert [path.name for path in complete_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    for seen in returned(run, 2, tmp_path, limited, None, "auto"):
        assert seen["left"] == ["checkpoint-6"]


@pytest.mark.parametrize("greater", [False, True], ids=["last", "first"])
def test_the_best_checkpoint_is_loaded_at_the_end(greater, tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1}
    best |= {"metric_for_best_model": "loss", "greater_is_better": greater, "max_steps": 4}
    seen = {name: returned(run, 2, tmp_path / name, {**best, **way}) for name, way in (("w", {}), ("a", ASYNC))}
    kept = "checkpoint-2" if greater else "checkpoint-4"
    for one, other in zip(seen["w"], seen["a"], strict=True):
        assert_same_end(one, other)
        assert other["best"] == str(tmp_path / "a/out" / kept) and one["left"] == other["left"]


def test_an_error_of_training_waits_for_the_save_in_flight(tmp_path):
    for seen in returned(end_while_writing, 2, tmp_path, "error"):
        assert seen["said"] == "enough" and seen["left"] == ["checkpoint-2"] == seen["complete"]


def test_where_both_fail_both_are_said(tmp_path):
    for seen in returned(end_while_writing, 2, tmp_path, "error", "fail"):
        first, *rest = seen["said"].splitlines()
        assert first == "enough" and "rank 1: OSError: [Errno 28] No space left on device" in "\n".join(rest)
        assert "there is none before it" in seen["said"] and seen["complete"] == []


def test_a_signal_saves_and_waits_for_both_saves(tmp_path):
    for seen in returned(end_while_writing, 2, tmp_path, "signal"):
        assert seen["interrupted"] and seen["step"] == 3 and seen["said"] == ""
        assert seen["complete"] == ["checkpoint-2", "checkpoint-3"] == seen["left"]


def test_it_is_refused_in_one_process(tmp_path):
    with pytest.raises(ValueError, match="async_save is True in a run of 1 process: it needs FSDP2"):
        make_trainer(tmp_path, async_save=True)


def test_it_is_refused_under_ddp(tmp_path):
    for *_, error in launch(run, 2, tmp_path, {**ASYNC, "fsdp": None}):
        assert "ValueError: async_save is True under DDP: it needs FSDP2" in error


@pytest.mark.parametrize(
    ("kind", "version", "state_dict_type", "pushes", "words"),
    [
        (DistributedType.MULTI_GPU, None, None, False, "under DDP"),
        (DistributedType.DEEPSPEED, None, None, False, "under DeepSpeed"),
        (DistributedType.FSDP, 1, StateDictType.SHARDED_STATE_DICT, False, "under FSDP1"),
        (DistributedType.FSDP, 2, StateDictType.FULL_STATE_DICT, False, "with FULL_STATE_DICT"),
        (DistributedType.FSDP, 2, StateDictType.SHARDED_STATE_DICT, True, "would be pushed before it is written"),
        (DistributedType.FSDP, 2, StateDictType.SHARDED_STATE_DICT, False, None),
    ],
)
def test_it_is_refused_where_nothing_is_written_in_shards(kind, version, state_dict_type, pushes, words):
    plugin = version and SimpleNamespace(fsdp_version=version, state_dict_type=state_dict_type)
    accelerator = SimpleNamespace(
        num_processes=2, distributed_type=kind, state=SimpleNamespace(fsdp_plugin=plugin) if plugin else None
    )
    trainer = SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(push_to_hub=pushes))
    if words is None:
        refuse_async_save(trainer)
        return
    with pytest.raises(ValueError, match=words):
        refuse_async_save(trainer)
