"""Lines of other trainers' scripts, and values that are refused."""

import dataclasses
import json
import re
import shlex
from typing import get_type_hints

import pytest

from orpo import train
from orpo.cli.arguments import DataArguments, ModelArguments, parse
from orpo.cli.other_names import ELSEWHERE, advice
from orpo.cli.short_help import GROUPS
from orpo.launch import launch_config
from orpo.trainer.config import ORPOConfig

LINE = ["--model_name_or_path", "gpt2", "--dataset_name", "d", "--use_cpu"]

# As TRL's documentation of ORPO runs its script, whole and with a LoRA.
TRL_LINES = (
    "--per_device_train_batch_size 4 --max_steps 1000 --learning_rate 8e-6 --gradient_accumulation_steps 1 "
    "--logging_steps 10 --eval_steps 500 --warmup_steps 150 --report_to none --bf16 --logging_first_step "
    "--no_remove_unused_columns",
    "--per_device_train_batch_size 4 --max_steps 1000 --learning_rate 8e-5 --gradient_accumulation_steps 1 "
    "--logging_steps 10 --eval_steps 500 --optim rmsprop --warmup_steps 150 --report_to none --bf16 "
    "--logging_first_step --no_remove_unused_columns --use_peft --lora_r 16 --lora_alpha 16",
)


@pytest.mark.parametrize("line", TRL_LINES)
def test_the_lines_of_trls_documentation(line, tmp_path):
    model, _, args = parse([*LINE, "--output_dir", str(tmp_path), *line.split()])
    assert (args.max_steps, args.logging_first_step, args.remove_unused_columns) == (1000, True, False)
    assert model.use_peft == ("--use_peft" in line)


def test_every_boolean_can_be_switched_off_on_the_line(tmp_path):
    known = {name: hint for name, hint in get_type_hints(ORPOConfig).items() if name in ORPOConfig.__dataclass_fields__}
    booleans = [name for name, hint in known.items() if hint in (bool, bool | None)]
    off = sorted(set(booleans) - {"use_cpu", "no_cuda"})
    assert len(off) > 40
    _, _, args = parse([*LINE, "--output_dir", str(tmp_path), *(f"--no_{name}" for name in off)])
    for name in ("remove_unused_columns", "gradient_checkpointing", "nll_scores_eos", "bf16", "disable_dropout"):
        assert getattr(args, name) is False, name
    assert (
        parse([*LINE, "--output_dir", str(tmp_path), "--no-gradient-checkpointing"])[2].gradient_checkpointing is False
    )


@pytest.mark.parametrize("name", ["ModelConfig", "ScriptArguments"])
def test_every_field_of_trls_scripts_is_an_option(name, tmp_path):
    theirs = getattr(pytest.importorskip("trl", reason="compares with TRL, which is not installed"), name)
    ours = {f.name for cls in (ModelArguments, DataArguments) for f in dataclasses.fields(cls)}
    assert {f.name for f in dataclasses.fields(theirs)} <= ours


def test_trls_lora_settings_reach_peft():
    line = "--use_peft --use_rslora --use_dora --lora_target_parameters a.b c --lora_task_type CAUSAL_LM".split()
    config = parse([*LINE, *line])[0].peft_config()
    assert (config.use_rslora, config.use_dora, config.target_parameters) == (True, True, ["a.b", "c"])
    line = ["--use_peft", "--lora_target_modules"]
    assert parse([*LINE, *line, ".*(q|v)_proj"])[0].peft_config().target_modules == ".*(q|v)_proj"
    assert parse([*LINE, *line, "attn.q_proj"])[0].peft_config().target_modules == {"attn.q_proj"}
    assert parse([*LINE, *line, r".*\.(q|v)_proj{1,2}"])[0].peft_config().target_modules == r".*\.(q|v)_proj{1,2}"


@pytest.mark.parametrize("words", ["q_proj,v_proj", "q_proj, v_proj", "q_proj ,v_proj,", "q_proj v_proj"])
def test_names_may_have_commas_between_them(words):
    options = [part for name in ("target_modules", "modules_to_save") for part in (f"--lora_{name}", *words.split())]
    config = parse([*LINE, "--use_peft", *options])[0].peft_config()
    assert (config.target_modules, config.modules_to_save) == ({"q_proj", "v_proj"}, ["q_proj", "v_proj"])
    one = parse([*LINE, "--use_peft", "--lora_target_parameters", words])[0].peft_config()
    assert one.target_parameters == ["q_proj", "v_proj"]


@pytest.mark.parametrize("words", [["all-linear", "lm_head"], ["all-linear,lm_head"], ["v_proj", ".*q_proj"]])
def test_a_pattern_among_names_is_refused(words):
    model = parse([*LINE, "--use_peft", "--lora_target_modules", *words])[0]
    with pytest.raises(
        ValueError, match=r"lora_target_modules is .*; (all-linear|\.\*q_proj) is no name, and has to s"
    ):
        model.peft_config()


def test_quantization_reaches_bitsandbytes(monkeypatch):
    monkeypatch.setattr("orpo.packages._is_installed", lambda package: True)
    line = ["--load_in_4bit", "--bnb_4bit_quant_type", "fp4", "--bnb_4bit_quant_storage", "bfloat16"]
    config = parse([*LINE, *line])[0].init_kwargs()["quantization_config"]
    assert config.bnb_4bit_quant_type == "fp4" and str(config.bnb_4bit_quant_storage) == "torch.bfloat16"


def test_older_names_of_trls_scripts():
    with pytest.warns(FutureWarning, match="torch_dtype is an older name: use dtype='bfloat16'"):
        assert parse([*LINE, "--torch_dtype", "bfloat16"])[0].dtype == "bfloat16"
    with pytest.warns(FutureWarning, match="ignore_bias_buffers does nothing here"):
        parse([*LINE, "--ignore_bias_buffers"])
    with pytest.warns(FutureWarning, match="use activation_checkpointing_kwargs={'use_reentrant': False}"):
        args = parse([*LINE, "--gradient_checkpointing_use_reentrant", "false"])[2]
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    with pytest.warns(FutureWarning, match="use train_sampling_strategy='group_by_length'"):
        assert parse([*LINE, "--group_by_length"])[2].train_sampling_strategy == "group_by_length"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lora_task_type SEQ_CLS", "lora_task_type is 'SEQ_CLS'; it has to be CAUSAL_LM or SEQ_2_SEQ_LM"),
        ("--bnb_4bit_quant_type int3", "bnb_4bit_quant_type is 'int3'; it has to be nf4 or fp4"),
        ("--load_in_4bit --load_in_8bit", "load_in_4bit and load_in_8bit are both given"),
        ("--lora_r 0", "lora_r is 0; it has to be at least 1"),
        ("--lora_dropout 1", r"lora_dropout is 1\.0; it has to be at least 0 and below 1"),
        ("--seed -1", "seed is -1; it has to be 0 or more, and below 4294967296"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size is 0; it has to be 1 or more"),
        ("--per_device_eval_batch_size -1", "per_device_eval_batch_size is -1"),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps is 0; it has to be 1 or more"),
        ("--learning_rate nan", "learning_rate is nan; it has to be 0 or more, and finite"),
        ("--weight_decay -1", r"weight_decay is -1\.0"),
        ("--adam_beta2 1", r"adam_beta2 is 1\.0; it has to be 0 or more, and below 1"),
        ("--max_grad_norm nan", "max_grad_norm is nan"),
        ("--warmup_steps inf", "warmup_steps is inf"),
        ("--num_train_epochs -1", r"num_train_epochs is -1\.0; .* unless max_steps is given"),
        ("--num_train_epochs nan", "num_train_epochs is nan"),
        ("--save_steps 0", r"save_steps is 0; to save no checkpoint, set save_strategy to no"),
        ("--logging_steps nan", "logging_steps is nan"),
        ("--dataloader_num_workers -1", "dataloader_num_workers is -1"),
        ("--dataset_num_proc 0", "dataset_num_proc is 0; it has to be 1 or more"),
        ("--strip_bytes 0", "strip_bytes is 0; it has to be 1 or more"),
        ("--model_init_kwargs {broken", "model_init_kwargs is no JSON: .* it is '{broken'"),
        (
            "--lr_scheduler_kwargs abc",
            "lr_scheduler_kwargs is 'abc'; it has to be a mapping, on the command line as JS",
        ),
        ('--lr_scheduler_kwargs {"nope":1}', "lr_scheduler_kwargs holds nope; it may hold last_epoch"),
        ("--orpo_alpha 0.1", "--orpo_alpha is no option, the name in axolotl for beta"),
        ("--micro-batch-size=2", "--micro-batch-size=2 is no option, the name in axolotl for per_device_train_batch"),
        ("--cutoff_len 9", "--cutoff_len is no option, the name in LLaMA-Factory for max_length"),
    ],
)
def test_what_is_refused_on_the_line(line, message):
    with pytest.raises(ValueError, match=message):
        parse([*LINE, *line.split()])


def test_an_unknown_key_of_a_mapping_is_named(tmp_path):
    with pytest.raises(ValueError, match="accelerator_config holds nonsense; it may hold split_batches"):
        ORPOConfig(str(tmp_path), accelerator_config={"nonsense": 1}, use_cpu=True)
    given = json.dumps({"even_batches": False})
    assert ORPOConfig(str(tmp_path), accelerator_config=given, use_cpu=True).accelerator_config.even_batches is False


@pytest.mark.parametrize("off", [False, None, "off", "none", "no"])
def test_what_is_switched_off_by_any_of_its_words(off, tmp_path):
    names = ("eval_strategy", "save_strategy", "logging_strategy")
    args = ORPOConfig(str(tmp_path), use_cpu=True, report_to=off, **dict.fromkeys(names, off))
    assert [getattr(args, name).value for name in names] == ["no"] * 3 and args.report_to == []


def test_fsdp_is_switched_on_by_the_line_of_the_torchrun_script(tmp_path, monkeypatch):
    # It sets variables that later trainers of this process would read.
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "false")
    options = shlex.split(re.search(r"with (--fsdp .*) FSDP2", launch_config("torchrun"))[1])
    args = parse([*LINE, "--output_dir", str(tmp_path), *options])[2]
    assert args.fsdp is True and args.fsdp_plugin_args["fsdp_version"] == 2


def test_other_trainers_names_are_no_options_of_ours():
    ours = {f.name for cls in (ModelArguments, DataArguments, ORPOConfig) for f in dataclasses.fields(cls)}
    assert not ours & ELSEWHERE.keys()
    for tool, text in ELSEWHERE.values():
        assert tool and text.startswith(("nothing", *ours))
    assert advice("lerning_rate", ours) == "did you mean learning_rate?" and advice("xyzzy", ours) is None


def test_help_fits_a_screen_and_help_all_has_everything(capsys):
    texts = []
    for word in ("--help", "-h", "--help_all"):
        with pytest.raises(SystemExit) as end:
            train.main([word])
        assert end.value.code == 0
        texts.append(capsys.readouterr().out)
    short, again, whole = texts
    assert short == again and len(short.splitlines()) <= 60 and short.startswith("Train a causal language model")
    assert all(f"--{name} " in short for options in GROUPS.values() for name in options)
    assert "--adam_beta1" in whole and "[1e-06]" in short and "SUPPRESS" not in short


@pytest.mark.parametrize(
    ("given", "ours"), [("lr", "learning_rate"), ("epochs", "num_train_epochs"), ("model", "model_name_or_path")]
)
def test_short_names_are_no_abbreviations(given, ours):
    with pytest.raises(ValueError, match=f"--{given} is no option, the name in many scripts for {ours}"):
        parse([f"--{given}", "1"])
