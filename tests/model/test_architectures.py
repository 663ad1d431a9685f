"""Two training steps on a tiny random model of many architectures: the loss and gradient norm of its own logits."""

import copy

import pytest
import torch
from tiny import SEVEN, make_model, make_tokenizer, reference_loss

from orpo.data.prepare import Limits, prepare_dataset
from orpo.layouts.layout import PaddedLayout
from orpo.model.attach import LossCall, attach_orpo_loss
from orpo.model.probe import check_fused_logps

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

# Model type -> what has to be changed in tiny.SMALL; the heads that differ say how.
ARCHITECTURES = {
    "arcee": {},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
    "bert": {"is_decoder": True},  # the head is cls.predictions.decoder, behind a transformation
    "biogpt": {},  # the head is called output_projection
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {**GPT2, "n_ctx": 256, "rotary_dim": 4},  # bias in the head
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "deepseek_v3": {
        **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
        **EXPERTS,
        **LATENT,
    },
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {"head_dim": None},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "glm": {},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gpt_oss": EXPERTS,
    "gptj": {**GPT2, "rotary_dim": 4},  # bias in the head
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {**EXPERTS, "logits_scaling": 2.0},
    "helium": {},
    "llama": {},
    "mamba": {"use_mambapy": False},
    "mistral": {"sliding_window": 8},
    "mixtral": {**EXPERTS, "output_router_logits": True},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "nanochat": {},  # softcap 15
    "nemotron": {},
    "olmo2": {},
    "olmoe": EXPERTS,
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 64, "do_layer_norm_before": False},  # project_out before the head
    "persimmon": {},
    "phi": {},  # bias in the head
    "phi3": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
}


def gradient_norm(model):
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_two_steps(model_type):
    examples = list(prepare_dataset(SEVEN, make_tokenizer(), Limits(), report=lambda _: None))[:4]
    batch = PaddedLayout(pad_token_id=0)(examples)
    call = LossCall(batch.pop("orpo").rows)
    plain = make_model(model_type, **ARCHITECTURES[model_type])
    fused = copy.deepcopy(plain)
    attach_orpo_loss(fused)
    check_fused_logps(fused)
    for _ in range(2):
        loss, expected = fused(**batch, orpo=call).loss, reference_loss(plain, examples)
        for model, value in ((fused, loss), (plain, expected)):
            model.zero_grad()
            value.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert gradient_norm(fused) == pytest.approx(gradient_norm(plain), rel=1e-4)
        for model in (fused, plain):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.05 * parameter.grad
