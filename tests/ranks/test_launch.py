"""What `orpo-train --print-config` prints is what accelerate reads."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from tiny import ROWS, make_model, make_tokenizer

from orpo.cli.arguments import parse
from orpo.launch import launch_config, launch_names

KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "fsdp2-sharded": DistributedType.FSDP,
    "hsdp": DistributedType.FSDP,
    "tp": DistributedType.MULTI_GPU,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}
SCRIPTS = ("slurm", "torchrun")


def test_every_configuration_is_listed_here():
    assert launch_names() == sorted([*KINDS, *SCRIPTS])


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name, tmp_path):
    file = tmp_path / "launch.yaml"
    file.write_text(launch_config(name))
    config = load_config_from_file(str(file))
    assert config.distributed_type == KINDS[name]
    assert (config.mixed_precision, config.use_cpu) == ("bf16", False)
    assert config.num_processes == (16 if name == "hsdp" else 2)


@pytest.mark.parametrize("name", ["hsdp", "tp"])
def test_copies_times_parts_are_all_processes(name):
    config = yaml.safe_load(launch_config(name))
    sizes = config["parallelism_config"]
    assert math.prod(sizes.values()) == config["num_processes"] and config["num_machines"] == (
        2 if name == "hsdp" else 1
    )
    parsed = launch_command_parser().parse_args(["--use_fsdp", "script.py"])
    # Not set by the file, it is refused; accelerate hands on the sizes under these names.
    assert all(hasattr(parsed, name) for name in sizes)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-sharded", "hsdp"])
def test_fsdp_settings_are_accelerates(name):
    # accelerate hands them on as FSDP_..., and does not read a name that it does not know.
    known = {option.lstrip("-") for action in launch_command_parser()._actions for option in action.option_strings}
    settings = yaml.safe_load(launch_config(name))["fsdp_config"]
    assert settings.keys() <= known and settings["fsdp_version"] == 2
    assert ("sharded" in name) == (settings["fsdp_state_dict_type"] == "SHARDED_STATE_DICT")


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_settings_are_accelerates(stage):
    known = {option.lstrip("-") for action in launch_command_parser()._actions for option in action.option_strings}
    settings = yaml.safe_load(launch_config(f"zero{stage}"))["deepspeed_config"]
    assert settings.keys() <= known and settings["zero_stage"] == stage
    # Without them every rank would hold the whole model, and the trainer would refuse to save parts of it.
    assert settings["zero3_init_flag"] == settings["zero3_save_16bit_model"] == (stage == 3)


def test_the_command_prints_it():
    line = [sys.executable, "-m", "orpo.train", "--print-config", "fsdp2"]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == launch_config("fsdp2")


def test_an_unknown_name_is_answered_with_the_names(capsys):
    with pytest.raises(SystemExit):
        parse(["--print_config", "fsdp3"])
    assert "ddp, fsdp2, fsdp2-sharded, hsdp, slurm, torchrun, tp, zero2, zero3" in capsys.readouterr().err


def executable(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_slurm_starts_one_launcher_a_node(tmp_path):
    """srun is stood in for by a loop over two nodes, accelerate by what it was called with."""
    executable(tmp_path, "scontrol", "echo node-a; sleep 0.3; echo node-b")
    executable(tmp_path, "srun", 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done')
    executable(tmp_path, "accelerate", 'printf "%s|" "$@"; echo')
    (tmp_path / "slurm.sh").write_text(launch_config("slurm"))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2"}
    line = ["bash", "slurm.sh", "--config", "run.yaml", "--output_dir", "out folder"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for node, words in enumerate(lines):
        parsed = launch_command_parser().parse_args(words.rstrip("|").split("|")[1:])
        assert (parsed.num_machines, parsed.num_processes, parsed.machine_rank) == (2, 16, node)
        assert (parsed.main_process_ip, parsed.config_file) == ("node-a", "launch.yaml")
        assert (parsed.module, parsed.training_script) == (True, "orpo.train")
        assert parsed.training_script_args == ["--config", "run.yaml", "--output_dir", "out folder"]


def test_torchrun_starts_two_nodes(tmp_path):
    """Two agents on this machine, one rank each, train the demonstration's model for two steps."""
    (tmp_path / "torchrun.sh").write_text(launch_config("torchrun"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    line = ["--model_name_or_path", "model", "--dataset_name", "pairs.jsonl", "--output_dir", "out", "--max_steps", "2"]
    settings = ["--use_cpu", "--report_to", "none", "--per_device_train_batch_size", "1", "--save_strategy", "no"]
    environment = {
        **os.environ,
        **{"HEAD": "127.0.0.1", "PORT": str(port), "NODES": "2", "GPUS": "1", "OMP_NUM_THREADS": "1"},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    nodes = [
        subprocess.Popen(
            ["bash", "torchrun.sh", *line, *settings],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert all(node.returncode == 0 for node in nodes), said
    told = "2 ranks (cpu), DDP: each holds the whole model"
    # Each node has a log of its own.
    assert [text.count(told) for text in said] == [1, 1] and (tmp_path / "out" / "model.safetensors").exists()
