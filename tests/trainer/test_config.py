"""TRL's defaults, presets, older names, and settings that are refused."""

import dataclasses
import warnings

import pytest
from accelerate import ParallelismConfig
from orpo_kernels.settings import LossSettings
from tiny import make_model
from transformers import HfArgumentParser

from orpo.model.attach import attach_orpo_loss
from orpo.trainer.config import ORPOConfig


def make(tmp_path, **settings):
    return ORPOConfig(output_dir=str(tmp_path), **settings)


def test_defaults_are_trls(tmp_path):
    config = make(tmp_path)
    expected = {
        "beta": 0.1,
        "learning_rate": 1e-6,
        "logging_steps": 10,
        "gradient_checkpointing": True,
        "max_length": 1024,
        "max_completion_length": None,
        "disable_dropout": True,
        "padding_value": None,
        "generate_during_eval": False,
        "model_init_kwargs": None,
        "trust_remote_code": False,
        "dataset_num_proc": None,
        "logging_nan_inf_filter": False,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_every_field_of_trls_config_is_accepted(tmp_path):
    orpo = pytest.importorskip("trl.experimental.orpo", reason="compares with TRL, which is not installed")
    theirs = {f.name for f in dataclasses.fields(orpo.ORPOConfig)}
    assert theirs <= {f.name for f in dataclasses.fields(ORPOConfig)}


@pytest.mark.parametrize(
    ("settings", "beta", "span", "eos"),
    [
        ({}, 0.1, "prompt_and_chosen", True),
        ({"preset": "paper"}, 1.0, "prompt_and_chosen", False),
        ({"preset": "response_only"}, 0.1, "chosen", True),
        ({"preset": "paper", "beta": 0.0, "nll_scores_eos": True}, 0.0, "prompt_and_chosen", True),
    ],
)
def test_presets_and_what_overrides_them(tmp_path, settings, beta, span, eos):
    config = make(tmp_path, **settings)
    assert (config.beta, config.nll_span, config.nll_scores_eos) == (beta, span, eos)
    nll = config.nll(eos_token_id=2)
    assert nll.prompt == (span == "prompt_and_chosen") and nll.skip_token_id == (None if eos else 2)


def test_older_names_are_mapped_with_a_warning(tmp_path):
    with pytest.warns(FutureWarning, match="evaluation_strategy is an older name: use eval_strategy='steps'"):
        config = make(tmp_path, evaluation_strategy="steps", eval_steps=3)
    assert config.eval_strategy == "steps"
    with pytest.warns(FutureWarning, match="warmup_ratio is an older name"):
        config = make(tmp_path, warmup_ratio=0.1)
    assert config.get_warmup_steps(200) == 20
    with pytest.warns(FutureWarning, match="no_cuda is an older name"):
        assert make(tmp_path, no_cuda=True).use_cpu
    with pytest.warns(FutureWarning, match="overwrite_output_dir no longer does anything"):
        make(tmp_path, overwrite_output_dir=True)


@pytest.mark.parametrize("name", ["logging_nan_inf_filter", "remove_unused_columns"])
def test_settings_that_would_break_training_are_switched_off(tmp_path, name):
    with pytest.warns(FutureWarning, match=f"{name} is switched off"):
        assert getattr(make(tmp_path, **{name: True}), name) is False


def test_gradient_checkpointing_by_either_name_and_without_noise(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make(tmp_path).activation_checkpointing
        assert not make(tmp_path, gradient_checkpointing=False).activation_checkpointing
        assert not make(tmp_path, activation_checkpointing=False).gradient_checkpointing


def test_a_config_can_be_rebuilt(tmp_path):
    config = make(tmp_path, preset="paper", max_length=64)
    again = dataclasses.replace(config, learning_rate=1e-4)
    assert (again.beta, again.max_length, again.learning_rate) == (1.0, 64, 1e-4)
    assert config.to_json_string()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "dpo"}, "preset is 'dpo'; it has to be one of trl, paper, response_only"),
        ({"beta": -1}, "beta is -1; it has to be 0 or more"),
        ({"nll_weight": float("inf")}, "nll_weight is inf"),
        ({"normalization": "none"}, "normalization is 'none'; it has to be one of global, micro_batch"),
        ({"nll_span": "prompt"}, "nll_span is 'prompt'; it has to be one of prompt_and_chosen, chosen"),
        ({"layout": "woven"}, "layout is 'woven'"),
        ({"loss_backend": "jax"}, "loss_backend is 'jax'"),
        ({"max_length": 8, "max_prompt_length": 9}, "max_prompt_length is 9 and max_length 8"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor is 0\.1"),
        ({"fp16": True, "use_cpu": True}, "fp16 is set, and there is no accelerator that has it"),
    ],
)
def test_settings_that_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **settings)


def test_a_weight_beside_which_the_nll_does_not_count_is_told(tmp_path):
    with pytest.warns(UserWarning, match=r"beta is 1000000.0 and nll_weight 1.0: .* 0.1 to 1 is usual"):
        make(tmp_path, beta=1e6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tmp_path, beta=1.0, nll_weight=0.01)
        # The odds ratio alone, on purpose.
        make(tmp_path, beta=1.0, nll_weight=0.0)


def test_every_field_is_an_option_with_help(tmp_path, capsys):
    parser = HfArgumentParser(ORPOConfig)
    (config,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--beta", "0.2", "--preset", "paper", "--logits_budget", "0", "--bf16", "false"]
    )
    assert (config.beta, config.nll_scores_eos, config.logits_budget, config.bf16) == (0.2, False, 0, False)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "--nll_span" in capsys.readouterr().out


def test_ligers_own_cross_entropy_is_switched_off_with_a_word(tmp_path):
    with pytest.warns(UserWarning, match="liger_kernel_config: cross_entropy is switched off"):
        config = make(tmp_path, use_liger_kernel=True, liger_kernel_config={"cross_entropy": True})
    assert config.liger_kernel_config == {"fused_linear_cross_entropy": False, "cross_entropy": False}


def test_ligers_kernels_leave_the_forward_alone(tmp_path):
    """Its cross-entropy would replace the forward that takes the loss's rows."""
    apply = pytest.importorskip("liger_kernel.transformers").apply_liger_kernel_to_llama
    given = {"rope": False, "rms_norm": False}
    config = make(tmp_path, use_liger_kernel=True, liger_kernel_config=given).liger_kernel_config
    assert config == {"rope": False, "rms_norm": False, "fused_linear_cross_entropy": False, "cross_entropy": False}
    model = make_model("llama")
    attach_orpo_loss(model)
    before = model.forward
    apply(model=model, swiglu=False, **config)
    assert model.forward == before


def test_each_setting_of_the_loss_reaches_it(tmp_path):
    given = {"beta": 0.2, "nll_weight": 0.5, "logits_budget": 7, "strip_bytes": 9}
    args = ORPOConfig(output_dir=str(tmp_path), use_cpu=True, loss_backend="torch", **given)
    assert args.loss_settings() == LossSettings(**given, backend="torch")


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_ranks_that_share_a_sequence_are_refused(name):
    with pytest.raises(ValueError, match=f"parallelism_config: {name} is 2.*leave it 1") as refused:
        ORPOConfig(parallelism_config=ParallelismConfig(**{name: 2}))
    assert "orpo_loss(cp_group=)" in str(refused.value)
    assert ORPOConfig(parallelism_config=ParallelismConfig(dp_shard_size=2)).parallelism_config.dp_shard_size == 2
