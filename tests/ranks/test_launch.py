"""What `orpo-train --print-config` prints is what accelerate reads."""

import subprocess
import sys

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from orpo.cli.arguments import parse
from orpo.launch import launch_config, launch_names

KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "fsdp2-sharded": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
}


def test_every_configuration_is_listed_here():
    assert launch_names() == sorted(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name, tmp_path):
    file = tmp_path / "launch.yaml"
    file.write_text(launch_config(name))
    config = load_config_from_file(str(file))
    assert config.distributed_type == KINDS[name]
    assert (config.mixed_precision, config.num_processes, config.use_cpu) == ("bf16", 2, False)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-sharded"])
def test_fsdp_settings_are_accelerates(name):
    # accelerate hands them on as FSDP_..., and does not read a name that it does not know.
    from accelerate.commands.launch import launch_command_parser

    known = {option.lstrip("-") for action in launch_command_parser()._actions for option in action.option_strings}
    settings = yaml.safe_load(launch_config(name))["fsdp_config"]
    assert settings.keys() <= known and settings["fsdp_version"] == 2
    assert ("sharded" in name) == (settings["fsdp_state_dict_type"] == "SHARDED_STATE_DICT")


def test_zero_settings_are_accelerates():
    from accelerate.commands.launch import launch_command_parser

    known = {option.lstrip("-") for action in launch_command_parser()._actions for option in action.option_strings}
    settings = yaml.safe_load(launch_config("zero2"))["deepspeed_config"]
    assert settings.keys() <= known and settings["zero_stage"] == 2


def test_the_command_prints_it():
    line = [sys.executable, "-m", "orpo.train", "--print-config", "fsdp2"]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == launch_config("fsdp2")


def test_an_unknown_name_is_answered_with_the_names(capsys):
    with pytest.raises(SystemExit):
        parse(["--print_config", "fsdp3"])
    assert "ddp, fsdp2, fsdp2-sharded, zero2" in capsys.readouterr().err
