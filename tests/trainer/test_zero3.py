"""What a run under ZeRO-3 cannot do is refused in words, before anything is loaded where the settings show it."""

from types import SimpleNamespace

import pytest
from tiny import make_encoder_decoder, make_model

from orpo.trainer.zero3 import is_zero_3, refuse_model, refuse_settings

WHOLE = "stage3_gather_16bit_weights_on_model_save"
FLAGS = ("diagnose", "generate_during_eval", "load_best_model_at_end", "auto_find_batch_size")


def settings(stage=3, zero=None, **changes):
    """As :class:`ORPOConfig` with the settings of DeepSpeed `zero`, for ``zero_optimization``."""
    tree = {"zero_optimization": {WHOLE: True, **(zero or {})}}

    def get_value(path):
        value = tree
        for name in path.split("."):
            value = None if value is None else value.get(name)
        return value

    plugin = SimpleNamespace(zero_stage=stage, hf_ds_config=SimpleNamespace(get_value=get_value))
    given = {**dict.fromkeys(FLAGS, False), "model_init_kwargs": None, **changes}
    return SimpleNamespace(**given, deepspeed_plugin=plugin)


REFUSED = [
    *[(settings(**{flag: True}), {}, flag) for flag in FLAGS],
    (settings(model_init_kwargs={"quantization_config": object()}), {}, "load_in_4bit"),
    (settings(), {"peft_config": object()}, "use_peft"),
    (settings(), {"makes_model": True}, "model_init is not supported"),
    (settings(zero={"offload_param": {"device": "cpu"}}), {}, r"offload_param \(device cpu\)"),
    (settings(zero={"zero_hpz_partition_size": 8}), {}, "zero_hpz_partition_size"),
    (settings(zero={"zero_quantized_weights": True}), {}, "zero_quantized_weights"),
    (settings(zero={WHOLE: False}), {}, f"set {WHOLE} true"),
]


@pytest.mark.parametrize(("args", "options", "said"), REFUSED)
def test_settings_are_refused_under_zero_3_alone(args, options, said):
    given = {"peft_config": None, "makes_model": False, **options}
    with pytest.raises(ValueError, match=said) as refusal:
        refuse_settings(args, **given)
    assert "{" not in str(refusal.value)
    args.deepspeed_plugin.zero_stage = 2
    refuse_settings(args, **given)
    args.deepspeed_plugin = None
    refuse_settings(args, **given)


def test_what_is_tested_passes():
    refuse_settings(settings(zero={"offload_param": {"device": "none"}}), None, makes_model=False)
    refuse_model(settings(), make_model("llama"))
    assert is_zero_3(settings()) and not is_zero_3(settings(stage=2))


def frozen():
    model = make_model("llama")
    model.model.embed_tokens.requires_grad_(False)
    return model


def with_adapter():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(make_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))


MODELS = {
    "encoder-decoder": lambda: make_encoder_decoder("t5"),
    "mixture of experts": lambda: make_model("mixtral"),
    "part is frozen": frozen,
    "adapter": with_adapter,
}


@pytest.mark.parametrize("said", MODELS)
def test_models_are_refused_under_zero_3_alone(said):
    model = MODELS[said]()
    with pytest.raises(ValueError, match=said):
        refuse_model(settings(), model)
    refuse_model(settings(stage=2), model)
