"""Tiny models, a tokenizer and pairs made on the spot: nothing is downloaded, a model trains a step in milliseconds."""

from __future__ import annotations

import functools
from typing import Any

import torch
from problems import log_odds
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
SPECIALS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]

# The seven rows of the talk that introduces ORPO with TRL's trainer: a plain dict of lists, with repeated prompts.
SEVEN = {
    "prompt": ["hello", "how are you", *["What is your name?"] * 2, *["Which is the best programming language?"] * 3],
    "chosen": ["hi nice to meet you", "I am fine", "My name is Mary", "My name is Mary", "Python", "Python", "Java"],
    "rejected": [
        "leave me alone",
        "I am not fine",
        "Whats it to you?",
        "I dont have a name",
        "Javascript",
        "C++",
        "C++",
    ],
}
# The same as a list of rows.
ROWS = [dict(zip(SEVEN, row, strict=True)) for row in zip(*SEVEN.values(), strict=True)]


@functools.cache
def trained_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for column in SEVEN.values() for text in column] * 4, trainer)
    return tokenizer.to_str()


def make_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of fewer than 400 tokens, with BOS, EOS and PAD unless `changes` says otherwise."""
    options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **changes}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained_bpe()), **options)


def make_encoder_tokenizer(template: str = "$A </s>") -> PreTrainedTokenizerFast:
    """:func:`make_tokenizer`'s, which puts the special tokens of `template` around a text: T5's EOS, or BART's two."""
    tokenizer = make_tokenizer(bos_token="<s>" if "<s>" in template else None)
    pieces = [(name, tokenizer.convert_tokens_to_ids(name)) for name in template.split() if name != "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=pieces)
    return tokenizer


SMALL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


ENCODER_DECODERS = {
    "t5": {
        **{"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 400},
        **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None},
    },
    "bart": {
        **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 400},
        **{"max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    },
}
# Of one config, under another name.
ENCODER_DECODERS |= {
    "mt5": {**ENCODER_DECODERS["t5"], "tie_word_embeddings": False},
    "switch_transformers": {**ENCODER_DECODERS["t5"], "num_experts": 2},
}
ENCODER_DECODERS |= dict.fromkeys(("pegasus", "marian", "mbart", "plbart"), ENCODER_DECODERS["bart"])


def make_encoder_decoder(model_type: str = "t5", seed: int = 0, **changes: Any) -> Any:
    """A random float32 encoder-decoder of that type, 2 layers of width 32 a side with a vocabulary of 400."""
    config = AutoConfig.for_model(model_type, **{**ENCODER_DECODERS[model_type], **changes})
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(1))
    return model.eval()


def make_model(model_type: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random float32 causal language model of that type, 2 layers of width 32 with a vocabulary of 400."""
    options = {k: v for k, v in {**SMALL, **changes}.items() if v is not None}
    config = AutoConfig.for_model(model_type, **options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        # Fresh models have zero biases and nearly uniform predictions, under which a wrong head looks right.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def reference_loss(model: Any, examples: list[dict[str, Any]], beta: float = 0.1, prompt_in_nll: bool = True) -> Tensor:
    """The ORPO loss of `examples` in double precision, from the model's own logits of one sequence at a time."""
    nll, tokens, terms = 0.0, 0, []
    for example in examples:
        odds = {}
        for side in ("chosen", "rejected"):
            ids = torch.tensor([example[f"{side}_input_ids"]])
            first = example[f"{side}_prompt_length"]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].double()
            logps = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            odds[side] = log_odds(logps[max(first - 1, 0) :].mean())
            if side == "chosen":
                scored = logps if prompt_in_nll else logps[max(first - 1, 0) :]
                nll, tokens = nll - scored.sum(), tokens + len(scored)
        terms.append(-torch.nn.functional.logsigmoid(odds["chosen"] - odds["rejected"]))
    return nll / tokens + beta * torch.stack(terms).mean()
