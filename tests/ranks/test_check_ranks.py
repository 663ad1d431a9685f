"""`orpo-train --check_ranks`: two ranks that are well, and one of two that lacks something or makes a mistake."""

import os
import re
import subprocess
import sys

import pytest
from run_check_ranks import check, place
from run_forked import returned
from tiny import ROWS

from orpo.layouts.batch import Counts

HERE = ["model", "pairs.jsonl"]


@pytest.fixture
def common(tmp_path):
    return place(tmp_path / "common")


def checked(tmp_path, places, *words, fsdp=False, mistake=False):
    """(status, lines of the report, what is left in each rank's folder); every rank has to end with the same status."""
    ends = returned(check, len(places), tmp_path / "ranks", [str(p) for p in places], list(words), fsdp, mistake)
    assert len({status for status, *_ in ends}) == 1 and not any(printed for _, printed, _ in ends[1:]), ends
    return ends[0][0], ends[0][1].splitlines(), [left for *_, left in ends]


def numbers(line):
    """Losses and norms of the two ways: a line of the report has each pair."""
    return [float(n) for n in re.search(r"loss (\S+) and (\S+), gradient norm (\S+) and (\S+);", line).groups()]


def well(lines):
    return {line.split(":")[0].removeprefix("ok").strip() for line in lines[1:] if line.startswith("ok ")}


ALL = {"model", "data", "disk", "step", "sent in a step by each rank"}


def test_one_process_has_nobody_to_agree_with(tmp_path, common):
    status, lines, left = checked(tmp_path, [common])
    assert status == 0 and "one process, which has no ranks to agree with" in lines[0] and well(lines) == ALL
    loss, alone, norm, norm_alone = numbers(lines[4])
    assert loss == pytest.approx(alone, rel=1e-5) and norm == pytest.approx(norm_alone, rel=1e-5) and norm > 0
    assert lines[5].endswith("sent in a step by each rank: none") and left == [HERE]


@pytest.mark.parametrize("words", [(), ("--normalization", "micro_batch")], ids=["", "means of micro-batches"])
def test_two_ranks_that_are_well(words, tmp_path, common):
    status, lines, left = checked(tmp_path, [common] * 2, *words)
    assert status == 0 and lines[0] == "check_ranks: 2 ranks, on cpu" and well(lines) == ALL
    assert "number of rows in the training set 7" in lines[2]
    assert "1 of 4 layers on 2 ranks and in one process" in lines[4]
    loss, alone, norm, norm_alone = numbers(lines[4])
    assert loss == pytest.approx(alone, rel=1e-5) and norm == pytest.approx(norm_alone, rel=1e-5) and norm > 0
    # One gradient a step, for all weights: two embeddings of 400 x 32, and the layer.
    sent = re.search(r"allreduce (\d+) \(([\d,]+) bytes\)", lines[5])
    weights = 2 * 400 * 32 + 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 3 * 32
    counts = 0 if words else 8 * len(Counts._fields)
    assert (int(sent[1]), int(sent[2].replace(",", ""))) == (1 + (not words), 4 * weights + counts)
    assert left == [HERE] * 2


def test_two_ranks_under_fsdp2(tmp_path, common):
    status, lines, left = checked(tmp_path, [common] * 2, fsdp=True)
    assert status == 0 and well(lines) == ALL
    loss, alone, norm, norm_alone = numbers(lines[4])
    assert loss == pytest.approx(alone, rel=1e-5) and norm == pytest.approx(norm_alone, rel=1e-5)
    sent = re.findall(r"(\w+) \d+ \(", lines[5])
    assert sent == ["allgather_base", "allreduce", "reduce_scatter_base"] and left == [HERE] * 2


def test_a_lora_and_a_stream(tmp_path, common):
    words = ["--use_peft", "--lora_target_modules", "q_proj", "--dataset_streaming", "true", "--lora_dropout", "0.5"]
    status, lines, left = checked(tmp_path, [common] * 2, *words)
    assert status == 0 and well(lines) == ALL and left == [HERE] * 2
    assert "number of rows" not in lines[2] and "content of the training set" in lines[2]


def test_a_rank_without_the_data(tmp_path, common):
    other = place(tmp_path / "other", rows=None)
    status, lines, left = checked(tmp_path, [common, other])
    assert status == 1 and well(lines) == {"model"}
    (told,) = [line for line in lines if line.startswith("FAILED data")]
    assert told == "FAILED data: rank 1: ValueError: there is no file or folder pairs.jsonl"
    assert lines[-1] == "FAILED step: not tried, since the ranks do not see the same"
    assert left == [HERE, ["model"]]


def test_a_rank_with_other_rows(tmp_path, common):
    other = place(tmp_path / "other", rows=ROWS[:-1])
    status, lines, _ = checked(tmp_path, [common, other])
    told = [line for line in lines if line.startswith("FAILED data")]
    assert status == 1 and len(told) == 3
    assert told[1] == "FAILED data: rank 1 has another number of rows in the training set than rank 0 (6, not 7)"


def test_a_rank_with_another_model(tmp_path, common):
    """Of the same sizes: only the weights differ."""
    other = place(tmp_path / "other", model_seed=1)
    status, lines, _ = checked(tmp_path, [common, other])
    (told,) = [line for line in lines if line.startswith("FAILED model")]
    assert status == 1 and told.startswith("FAILED model: rank 1 has another model.safetensors than rank 0 (")


def test_a_rank_without_a_file_of_the_model(tmp_path, common):
    other = place(tmp_path / "other")
    (common / "model/generation_config.json").unlink()
    status, lines, _ = checked(tmp_path, [common, other])
    assert status == 1 and "FAILED model: rank 0 lacks generation_config.json" in lines


def test_a_rank_with_a_disk_of_its_own(tmp_path, common):
    other = place(tmp_path / "other")
    status, lines, left = checked(tmp_path, [common, other])
    (told,) = [line for line in lines if line.startswith("FAILED disk")]
    assert told == "FAILED disk: rank 1 does not see in output_dir out/run the file that rank 0 has written"
    assert status == 1 and well(lines) == {"model", "data"} and left == [HERE] * 2


def test_disks_of_their_own_that_are_meant(tmp_path, common):
    other = place(tmp_path / "other")
    status, lines, left = checked(tmp_path, [common, other], "--save_on_each_node", "true")
    assert status == 0 and well(lines) == ALL and left == [HERE] * 2


def test_a_disk_that_a_rank_cannot_write_on(tmp_path, common):
    other = place(tmp_path / "other")
    (other / "out").write_text("a file in the way")
    status, lines, _ = checked(tmp_path, [common, other], "--save_on_each_node", "true")
    (told,) = [line for line in lines if line.startswith("FAILED disk")]
    assert status == 1 and told.startswith("FAILED disk: rank 1: ValueError: output_dir out/run cannot be written")


def test_ranks_that_do_not_add_up_what_they_count(tmp_path, common):
    status, lines, left = checked(tmp_path, [common] * 2, mistake=True)
    (told,) = [line for line in lines if line.startswith("FAILED step: not the same: ")]
    loss, alone, norm, norm_alone = numbers(told)
    assert status == 1 and abs(loss - alone) > 0.1 and abs(norm - norm_alone) > 0.1 and left == [HERE] * 2


def test_what_lies_in_output_dir_stays(tmp_path, common):
    kept = common / "out/run/checkpoint-1/notes.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    status, _, left = checked(tmp_path, [common] * 2)
    assert status == 0 and left == [["model", "out", "pairs.jsonl"]] * 2
    assert [path for path in (common / "out").rglob("*") if path.is_file()] == [kept] and kept.read_text() == "mine"


@pytest.mark.parametrize("missing", [False, True], ids=["well", "no data"])
def test_under_accelerates_launcher(missing, tmp_path, common):
    """As a user starts it: one line of status for the shell."""
    if missing:
        (common / "pairs.jsonl").unlink()
    (tmp_path / "launch.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nmixed_precision: 'no'\n"
        "num_machines: 1\nmachine_rank: 0\nmain_training_function: main\nnum_processes: 2\nmain_process_port: 0\n"
    )
    (common / "run.yaml").write_text(
        "model_name_or_path: model\ndataset_name: pairs.jsonl\noutput_dir: out\nuse_cpu: true\n"
        "per_device_train_batch_size: 1\n"
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "launch.yaml")]
    done = subprocess.run(
        [*launcher, "-m", "orpo.train", "--config", "run.yaml", "--check_ranks"],
        cwd=common,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode != 0) == missing, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert "check_ranks: 2 ranks, on cpu" in lines and not (common / "out").exists()
    for rank in range(2):
        text = f"FAILED data: rank {rank}: ValueError: there is no file or folder pairs.jsonl"
        assert any(line.startswith(text) for line in lines) == missing
