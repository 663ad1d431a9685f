"""The loss inside the model, and the models that it refuses."""

import copy

import peft
import pytest
import torch
from orpo_kernels.settings import LossSettings
from tiny import SEVEN, SMALL, make_model, make_tokenizer, reference_loss
from torch import nn
from transformers import AutoModelForCausalLM, WhisperConfig, WhisperForConditionalGeneration

from orpo.data.prepare import Limits, prepare_dataset
from orpo.layouts.layout import PaddedLayout
from orpo.model.attach import LogitTransform, LossCall, attach_orpo_loss
from orpo.model.head import head_operands
from orpo.model.probe import check_fused_logps


@pytest.fixture(scope="module")
def examples():
    return list(prepare_dataset(SEVEN, make_tokenizer(), Limits(), report=lambda _: None))


def loss_of(model, examples, **settings):
    batch = PaddedLayout(pad_token_id=0)(examples)
    call = LossCall(batch["orpo"].rows, LossSettings(**settings))
    return model(**{k: v for k, v in batch.items() if k != "orpo"}, orpo=call)


def assert_same_loss_and_gradients(model, examples):
    """The fused loss of `model` and its gradients equal those from its own logits."""
    loss = loss_of(model, examples).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = reference_loss(model, examples)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(
    ("model_type", "changes", "transform"),
    [
        ("llama", {}, LogitTransform()),
        ("gemma2", {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}, LogitTransform(1.0, 5.0)),
        ("cohere", {"logit_scale": 0.0625}, LogitTransform(0.0625)),
        ("granite", {"logits_scaling": 8.0}, LogitTransform(0.125)),
    ],
)
def test_what_follows_the_head_is_read_off_the_forward(model_type, changes, transform, examples):
    model = make_model(model_type, **changes)
    found = attach_orpo_loss(model).transform
    assert found.scale == pytest.approx(transform.scale, rel=1e-6) and found.softcap == transform.softcap
    assert check_fused_logps(model) < 1e-5
    assert_same_loss_and_gradients(model, examples)


def test_plain_forward_generation_and_saving_are_untouched(tmp_path, examples):
    model = make_model("llama")
    ids = torch.tensor([[1, 50, 60, 70]])
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}

    def outputs():
        return model(ids).logits, model(ids, labels=ids).loss, model.generate(ids, **options)

    before = outputs()
    attach_orpo_loss(model)
    loss_of(model, examples).loss.backward()
    for old, new in zip(before, outputs(), strict=True):
        assert torch.equal(old, new)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(reloaded(ids).logits, before[0], atol=1e-6)


def test_attaching_twice_changes_nothing(examples):
    model = make_model("llama")
    first = attach_orpo_loss(model)
    forward = model.forward
    assert attach_orpo_loss(model) is first and model.forward == forward
    assert_same_loss_and_gradients(model, examples)


def test_a_deep_copy_computes_with_its_own_weights(examples):
    model = make_model("llama")
    attach_orpo_loss(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.1)
    assert_same_loss_and_gradients(copied, examples)
    assert all(p.grad is None for p in model.parameters())


def test_output_holds_trls_metrics(examples):
    model = make_model("llama")
    attach_orpo_loss(model)
    out = loss_of(model, examples)
    assert out.pair_mask.all() and len(out.chosen_logps) == 7
    assert out.metrics["logps/chosen"] == pytest.approx(out.chosen_logps.mean().item())
    assert "logits/chosen" not in out.metrics
    assert not any(value.requires_grad for value in out.metrics.values())


def lora(model, **options):
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["lm_head"], "use_rslora": True, "lora_alpha": 3},
    ],
    ids=["frozen head", "head trained whole", "LoRA on the head", "rank-stabilized LoRA on the head"],
)
@pytest.mark.parametrize("attached_before", [False, True], ids=["", "attached before"])
def test_adapters(options, attached_before, examples):
    base = make_model("llama")
    if attached_before:
        attach_orpo_loss(base)
    model = lora(base, **options)
    attach_orpo_loss(model)
    check_fused_logps(model)
    assert_same_loss_and_gradients(model, examples)


def test_evaluation_with_lora_on_the_head_takes_trainings_way(examples, heads_taken_for_frozen):
    model = lora(make_model("llama"), target_modules=["lm_head"])
    attach_orpo_loss(model)
    loss = loss_of(model, examples, logits_budget=0).loss
    with torch.no_grad():
        out = loss_of(model, examples, logits_budget=0)
        assert not out.loss.requires_grad and out.loss == loss
    with model.disable_adapter():
        loss_of(model, examples, logits_budget=0)
    assert heads_taken_for_frozen == [False, False, True]


def test_dropout_of_a_lora_on_the_head(examples):
    model = lora(make_model("llama"), target_modules=["lm_head"], lora_dropout=0.5)
    attach_orpo_loss(model)
    still = [loss_of(model.eval(), examples).loss.item() for _ in range(2)]
    assert still[0] == still[1] == pytest.approx(reference_loss(model, examples).item(), rel=1e-6)
    assert len({loss_of(model.train(), examples).loss.item() for _ in range(3)} - set(still)) == 3


@pytest.mark.parametrize("size", [1e-6, 1e-2])
def test_a_small_lora_is_not_rounded_away_in_a_bfloat16_head(size):
    """Added into the weight, whose entries are some 1e-4 apart, 1e-6 would leave it as it is."""
    torch.manual_seed(0)
    inner = nn.ModuleDict({"lm_head": nn.Linear(64, 50, bias=False, dtype=torch.bfloat16)})
    head = peft.get_peft_model(inner, peft.LoraConfig(r=4, target_modules=["lm_head"])).base_model.model["lm_head"]
    nn.init.normal_(head.lora_A["default"].weight)
    nn.init.normal_(head.lora_B["default"].weight, std=size)
    hidden = torch.randn(7, 64, dtype=torch.bfloat16)
    x, weight, _ = head_operands(head, hidden)
    found = x.double() @ weight.double().T - hidden.double() @ head.base_layer.weight.double().T
    expected = hidden.double() @ head.get_delta_weight("default").double().T
    assert weight.dtype == torch.bfloat16 and weight.requires_grad
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_a_disabled_adapter_is_left_out(examples):
    model = lora(make_model("llama"), target_modules=["lm_head"])
    attach_orpo_loss(model)
    with model.disable_adapter():
        without = loss_of(model, examples).loss
        assert without.item() == pytest.approx(reference_loss(model, examples).item(), rel=1e-6)
    assert loss_of(model, examples).loss != without


def test_adapters_on_the_head_that_cannot_be_followed(examples):
    with pytest.raises(ValueError, match=r"DoRA .* are not supported"):
        attach_orpo_loss(lora(make_model("llama"), target_modules=["lm_head"], use_dora=True))
    with pytest.raises(ValueError, match="lora_bias on the output embeddings is not supported"):
        attach_orpo_loss(lora(make_model("llama"), target_modules=["lm_head"], lora_bias=True))
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="prompt-learning"):
        attach_orpo_loss(peft.get_peft_model(make_model("llama"), prompts))


class NormHead(nn.Linear):
    """A head that computes with something else than its weight."""

    def forward(self, hidden):
        return nn.functional.linear(hidden, nn.functional.normalize(self.weight))


def test_the_probe_refuses_a_head_that_computes_something_else():
    model = make_model("llama")
    model.lm_head = NormHead(SMALL["hidden_size"], SMALL["vocab_size"], bias=False)
    attach_orpo_loss(model)
    with pytest.raises(ValueError, match=r"differ from those of its own logits by up to .*silently wrong"):
        check_fused_logps(model)


def wrap_logits(model, change):
    """`model`, whose own forward changes its logits."""
    forward = type(model).forward

    class Changed(type(model)):
        def forward(self, *args, **kwargs):
            outputs = forward(self, *args, **kwargs)
            outputs.logits = change(outputs.logits)
            return outputs

    model.__class__ = Changed
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z**2, "neither a factor nor a tanh softcap"),
        (lambda z: z + 3, "neither a factor nor a tanh softcap"),
        (lambda z: torch.cat([z, z]), "changes the shape of its logits"),
    ],
)
def test_what_the_fused_loss_cannot_follow_is_refused(change, message):
    model = wrap_logits(make_model("llama"), change)
    with pytest.raises(ValueError, match=message):
        attach_orpo_loss(model)
    assert "forward" not in model.__dict__ and "_orpo_head" not in model.__dict__


def test_a_head_called_twice_or_never_is_refused():
    model = make_model("llama")

    class Twice(type(model)):
        def forward(self, *args, **kwargs):
            super().forward(*args, **kwargs)
            return super().forward(*args, **kwargs)

    model.__class__ = Twice
    with pytest.raises(ValueError, match=r"calls its output embeddings \(lm_head\) 2 times"):
        attach_orpo_loss(model)


def test_models_without_a_head_of_our_kind():
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 1)
    hearing = WhisperConfig(vocab_size=64, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, **sizes)
    with pytest.raises(
        ValueError, match=r"WhisperFor.* is an encoder-decoder that .* reads something else than tokens"
    ):
        attach_orpo_loss(WhisperForConditionalGeneration(hearing))
    model = make_model("llama")
    backbone = model.model
    with pytest.raises(ValueError, match="no output embeddings"):
        attach_orpo_loss(backbone)
    model.lm_head.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"without a floating-point \(V, D\) weight \(torch.int8, \(4, 4\)\)"):
        attach_orpo_loss(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_probe_allows_for_rounding(dtype):
    model = make_model("llama").to(dtype)
    attach_orpo_loss(model)
    check_fused_logps(model)


def test_a_model_spread_over_devices_is_refused():
    model = make_model("llama")
    model.hf_device_map = {"": 0}
    attach_orpo_loss(model)
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1, "lm_head": 0}
    with pytest.raises(ValueError, match=r"device_map has spread the model over 0, 1; .* load it on one device"):
        attach_orpo_loss(model)
