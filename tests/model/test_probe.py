"""A layout is used only with models that compute the same in it, and every layout trains alike."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from test_architectures import ARCHITECTURES
from tiny import SEVEN, make_model, make_tokenizer
from transformers import AttentionInterface, AttentionMaskInterface, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from orpo import ORPOConfig, ORPOTrainer
from orpo.data.prepare import Limits, prepare_dataset
from orpo.layouts.prefix_mask import eager_where_flash_cannot_run
from orpo.model.attach import LogitTransform, LossCall, attach_orpo_loss
from orpo.model.few_layers import few_layers
from orpo.model.probe import check_fused_logps, choose_layout, matmul_eps
from orpo.trainer.adapt import disable_dropout

# Positions by the order in memory (ALiBi, learned and counted, local windows), states, a router's loss.
NOT_SHARED = {"bart", "bloom", "gpt_neo", "mamba", "mixtral", "mpt"}
NOT_PACKED = NOT_SHARED - {"gpt_neo"} | {"bert", "biogpt", "gpt_oss", "granitemoe", "opt", "xglm"}
if Version(transformers.__version__) < Version("5.24"):
    # Its mask knew nothing of positions that restart.
    NOT_PACKED |= {"falcon"}


def trained(model, layout):
    """(loss, gradients) of the seven pairs."""
    examples = list(prepare_dataset(SEVEN, make_tokenizer(), Limits(), report=lambda _: None))
    batch = layout(examples)
    model.zero_grad()
    out = model(orpo=LossCall(batch.pop("orpo").rows), **batch)
    out.loss.backward()
    return out.loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def prepared(model_type, attention="eager", **changes):
    model = make_model(model_type, **{**ARCHITECTURES[model_type], **changes})
    if attention != "eager":
        model.set_attn_implementation(attention)
    disable_dropout(model)
    attach_orpo_loss(model)
    return model


def choose(name, model, **options):
    return choose_layout(name, model, max_length=64, pad_token_id=0, **options)


def assert_same(model, layout, padded):
    (loss, gradient), (expected, expected_gradient) = trained(model, layout), trained(model, padded)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_layout_that_is_not_refused_gives_the_padded_loss_and_gradient(model_type):
    model = prepared(model_type)
    padded, _ = choose("padded", model)
    for name, refused in (("shared", NOT_SHARED), ("packed", NOT_PACKED)):
        if model_type in refused:
            with pytest.raises(ValueError, match=rf"layout is {name!r}, which .* cannot be trained with: "):
                choose(name, model)
        else:
            assert_same(model, choose(name, model)[0], padded)
    layout, why = choose("auto", model)
    assert type(layout).__name__ == ("PaddedLayout" if model_type in NOT_SHARED else "SharedLayout")
    assert ("layout padded, not shared: " in why) == (model_type in NOT_SHARED)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "opt", "gemma3_text"])
def test_the_same_with_sdpa(model_type):
    model = prepared(model_type, "sdpa")
    padded, _ = choose("padded", model)
    assert_same(model, choose("shared", model)[0], padded)


def test_gradient_checkpointing_and_training_mode():
    model = prepared("llama", "sdpa").train()
    padded, _ = choose("padded", model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(model, choose("shared", model)[0], padded)
    assert model.training


def test_a_leak_between_the_answers_is_noticed(monkeypatch):
    model = prepared("llama")
    assert "shared" in choose("auto", model)[1]
    monkeypatch.setattr("orpo.layouts.prefix_mask.SharedPrefixMask.for_model", lambda self, model: None)
    assert "log-probabilities differ" in choose("auto", model)[1]


def test_a_boolean_mask_under_eager_attention_is_noticed(monkeypatch):
    model = prepared("llama")
    monkeypatch.setattr(
        "orpo.layouts.prefix_mask.SharedPrefixMask.for_model", lambda self, model: self.visible()[:, None]
    )
    assert "layout padded, not shared" in choose("auto", model)[1]


def test_a_window_that_training_will_reach_is_probed(monkeypatch):
    model = prepared("mistral")
    assert "layout shared" in choose("auto", model)[1]
    # As if nobody had put the window into the mask.
    monkeypatch.setattr("orpo.layouts.prefix_mask.layer_windows", lambda config: (None, set()))
    assert "log-probabilities differ" in choose("auto", model)[1]


def test_a_window_longer_than_a_sequence_but_not_than_a_row_is_probed():
    """GPT-Neo counts its window in tokens of the row, where the rejected answer stands behind the chosen one."""
    config = {**ARCHITECTURES["gpt_neo"], "window_size": 40}
    model = make_model("gpt_neo", **config)
    attach_orpo_loss(model)
    for max_length, expected in ((30, "log-probabilities differ"), (20, "layout shared")):
        assert expected in choose_layout("auto", model, max_length=max_length, pad_token_id=0)[1]


def test_a_window_is_tried_in_one_layer_of_each_kind(monkeypatch):
    """The last of six layers is the first to have a window; of six that are alike one is tried."""
    types = ["full_attention"] * 4 + ["sliding_attention"] * 2
    settings = {"num_hidden_layers": 6, "layer_types": types, "sliding_window": 4, "query_pre_attn_scalar": 8}
    model = make_model("gemma2", **settings)
    layers = model.model.layers
    with few_layers(model) as count:
        assert count == 5 and list(model.model.layers) == list(layers[:5])
    assert model.model.layers is layers
    attach_orpo_loss(model)
    ran = []
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: ran.append(layer.self_attn.layer_idx))
    assert "layout shared" in choose("auto", model)[1] and ran == [0, 1, 2, 3, 4] * 2
    monkeypatch.setattr("orpo.layouts.prefix_mask.layer_windows", lambda config: (None, set()))
    assert "log-probabilities differ" in choose("auto", model)[1]
    with few_layers(make_model("mistral", num_hidden_layers=6, sliding_window=4)) as count:
        assert count == 1


def test_a_window_that_no_position_reaches_beyond_cannot_be_probed():
    model = make_model("mistral", sliding_window=60, max_position_embeddings=64)
    attach_orpo_loss(model)
    assert "a window of 60 tokens cannot be tried" in choose_layout("auto", model, max_length=64, pad_token_id=0)[1]


def test_a_wrong_head_is_not_taken_for_a_wrong_layout():
    model = prepared("llama")
    model._orpo_head.transform = None
    model.lm_head._orpo_transform = type(model.lm_head._orpo_transform)(scale=2.0)
    with pytest.raises(ValueError, match=r"differ by .* from those of the model's own logits"):
        choose("auto", model)


def test_trainer_trains_alike_in_every_layout(tmp_path, capsys):
    model, losses = make_model(), {}
    for layout in ("padded", "packed", "shared", "auto"):
        args = ORPOConfig(
            output_dir=str(tmp_path / layout),
            layout=layout,
            max_steps=3,
            per_device_train_batch_size=3,
            logging_steps=1,
            learning_rate=1e-2,
            use_cpu=True,
            save_strategy="no",
        )
        trainer = ORPOTrainer(
            model=copy.deepcopy(model), args=args, train_dataset=SEVEN, processing_class=make_tokenizer()
        )
        trainer.train()
        losses[layout] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert capsys.readouterr().out.count("layout ") == 1
    for layout in ("packed", "shared", "auto"):
        assert losses[layout] == pytest.approx(losses["padded"], rel=1e-5)


def test_batches_of_similar_length_on_request(tmp_path):
    args = ORPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, train_sampling_strategy="group_by_length", use_cpu=True
    )
    data = {name: column * 8 for name, column in SEVEN.items()}
    trainer = ORPOTrainer(model=make_model(), args=args, train_dataset=data, processing_class=make_tokenizer())
    assert trainer.train_dataset["length"] == [
        len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) for row in trainer.train_dataset
    ]

    def spread(order):
        lengths = [trainer.train_dataset[i]["length"] for i in order]
        return sum(abs(a - b) for a, b in zip(lengths[::2], lengths[1::2], strict=True))

    grouped = list(trainer._get_train_sampler())
    assert sorted(grouped) == list(range(56))
    assert spread(grouped) < 0.2 * spread(torch.randperm(56, generator=torch.Generator().manual_seed(0)).tolist())


def half_precision_only(module, query, key, value, *arguments, **options):
    """As transformers calls FlashAttention: rotary embeddings give float32, which is cast to autocast's dtype."""
    states = query, key, value
    if torch.is_autocast_enabled("cpu"):
        states = [state.to(torch.get_autocast_dtype("cpu")) for state in states]
    if states[0].dtype == torch.float32:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return sdpa_attention_forward(module, *states, *arguments, **options)


@pytest.fixture
def flash_model(monkeypatch):
    """A model with float32 weights whose attention takes no float32, as FlashAttention, but runs on a CPU."""
    AttentionInterface.register("flash_stand_in", half_precision_only)
    AttentionMaskInterface.register("flash_stand_in", sdpa_mask)
    monkeypatch.setattr("orpo.layouts.prefix_mask._NO_FLASH", frozenset())
    model = make_model()
    model.config._attn_implementation = "flash_stand_in"
    return model


def test_flash_attention_trains_float32_weights_in_mixed_precision(flash_model, tmp_path, capsys):
    args = ORPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True, max_steps=1, save_strategy="no")
    ORPOTrainer(flash_model, args, train_dataset=SEVEN, processing_class=make_tokenizer()).train()
    assert "layout packed: a few pairs score as in the padded layout; not shared: " in capsys.readouterr().out


def test_flash_attention_on_float32_alone_is_refused_in_words(flash_model, tmp_path):
    args = ORPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=r"flash_stand_in and the weights are float32, .*: set bf16 true .* sdpa"):
        ORPOTrainer(flash_model, args, train_dataset=SEVEN, processing_class=make_tokenizer())


def gpu_only(module, query, *arguments, **options):
    """FlashAttention's operators are registered for GPUs alone."""
    if query.device.type == "cpu":
        raise NotImplementedError("Could not run 'flash_attn::_flash_attn_forward' with arguments from 'CPU'")
    return sdpa_attention_forward(module, query, *arguments, **options)


@pytest.fixture
def gpu_only_model():
    """A model whose attention does not run where its weights are, as before Trainer moves them."""
    AttentionInterface.register("flash_gpu_only", gpu_only)
    AttentionMaskInterface.register("flash_gpu_only", sdpa_mask)
    model = make_model("gemma2", final_logit_softcapping=5.0, query_pre_attn_scalar=8).to(torch.bfloat16)
    model.config._attn_implementation = "flash_gpu_only"
    return model


def test_flash_attention_is_not_called_where_it_cannot_run(gpu_only_model):
    assert attach_orpo_loss(gpu_only_model).transform.softcap == 5.0
    check_fused_logps(gpu_only_model)
    layout, why = choose("auto", gpu_only_model)
    assert type(layout).__name__ == "PaddedLayout"
    reason = "FlashAttention does not run on a CPU, where the weights are now, so that it cannot be tried"
    assert why == f"layout padded, not shared: {reason}"
    assert choose("padded", gpu_only_model)[1] == "layout padded, as asked for"
    for name in ("packed", "shared"):
        with pytest.raises(ValueError, match=f"layout is '{name}', which .* cannot be trained with: {reason}"):
            choose(name, gpu_only_model)


def test_it_is_called_again_in_training(gpu_only_model, tmp_path, capsys):
    args = ORPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True, max_steps=1, save_strategy="no")
    trainer = ORPOTrainer(gpu_only_model, args, train_dataset=SEVEN, processing_class=make_tokenizer())
    assert "layout padded, not shared: FlashAttention does not run on a CPU" in capsys.readouterr().out
    with pytest.raises(NotImplementedError, match="flash_attn"):
        trainer.train()


def test_a_wrong_head_is_noticed_without_flash_attention(gpu_only_model):
    attach_orpo_loss(gpu_only_model)
    gpu_only_model.lm_head._orpo_transform = LogitTransform(scale=2.0)
    with pytest.raises(ValueError, match="training would be silently wrong"):
        check_fused_logps(gpu_only_model)
    assert gpu_only_model.config._attn_implementation == "flash_gpu_only"


def test_every_sub_configuration_gets_its_own_attention_back():
    text = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision)
    model = Gemma3ForConditionalGeneration(config)
    model.config._attn_implementation = "flash_gpu_only"
    model.config.vision_config._attn_implementation = "sdpa"
    configs = model.config, model.config.text_config, model.config.vision_config
    with eager_where_flash_cannot_run(model):
        assert [c._attn_implementation for c in configs] == ["eager", "eager", "eager"]
    assert [c._attn_implementation for c in configs] == ["flash_gpu_only", "flash_gpu_only", "sdpa"]


def test_tolerance_follows_what_matmuls_round_to():
    model = make_model("llama")
    assert matmul_eps(model, "cuda") == matmul_eps(model, "cpu") == 2.0**-23
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matmul_eps(model, "cpu") == 2.0**-7
    previous = torch.backends.cuda.matmul.fp32_precision
    # What transformers' `tf32=True` sets.
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert (matmul_eps(model, "cuda"), matmul_eps(model, "cpu")) == (2.0**-10, 2.0**-23)
    finally:
        torch.backends.cuda.matmul.fp32_precision = previous
    model.config.quantization_config = SimpleNamespace(bnb_4bit_compute_dtype=torch.bfloat16)
    assert matmul_eps(model, "cpu") == 2.0**-7
