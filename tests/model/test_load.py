"""What is loaded, and what is refused, before training."""

import contextlib
import io
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from orpo_kernels.cpu import logits as cpu_logits
from tiny import SEVEN, make_encoder_decoder, make_model, make_tokenizer
from trainers import make_args, make_trainer
from transformers import LlamaConfig, T5ForConditionalGeneration, WhisperConfig

from orpo import ORPOTrainer
from orpo.model.load import load_model
from orpo.trainer.adapt import disable_dropout, pad_token_id, router_coefficient, warn_of_emulation


def test_weights_of_others_are_read_from_safetensors_unless_asked_otherwise(tmp_path):
    model, folder = make_model(), tmp_path / "model"
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(str(folder))
    loaded = load_model(str(folder), use_safetensors=False)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    folder, marker = tmp_path / "model", tmp_path / "code-ran"
    make_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(folder))
    assert not marker.exists()
    # The code is no model, but it runs: the marker is a witness that can speak.
    with pytest.raises((AttributeError, ImportError)):
        load_model(str(folder), trust_remote_code=True)
    assert marker.exists()


def test_an_encoder_decoder_is_loaded_and_one_that_hears_is_refused_by_name(tmp_path):
    make_encoder_decoder("t5").save_pretrained(tmp_path / "t5")
    assert isinstance(load_model(str(tmp_path / "t5")), T5ForConditionalGeneration)
    # Before its weights are read, which are not there.
    WhisperConfig().save_pretrained(tmp_path / "whisper")
    with pytest.raises(ValueError, match="is a whisper model, an encoder-decoder that does not read text"):
        load_model(str(tmp_path / "whisper"))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 64, "dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}),
    ],
)
def test_no_dropout_is_left_in_modules_or_in_functions(model_type, changes):
    model = make_model(model_type, **changes).train()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
        disable_dropout(model)
        trained = model(ids).logits
        assert torch.equal(trained, model(ids).logits)
        assert torch.allclose(trained, model.eval()(ids).logits, atol=1e-6)


def test_the_papers_preset_leaves_end_of_sequence_out_of_the_nll_and_weighs_the_odds_with_one(tmp_path):
    trainer = make_trainer(tmp_path, preset="paper", per_device_train_batch_size=7, max_steps=1)
    examples = list(trainer.train_dataset)
    model = make_model("llama")
    nll, odds, scored = 0.0, [], 0
    for example in examples:
        sides = {}
        for side in ("chosen", "rejected"):
            ids, first = torch.tensor([example[f"{side}_input_ids"]]), example[f"{side}_prompt_length"]
            logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            answer = logps[first - 1 :].mean()
            sides[side] = answer - torch.log(-torch.expm1(answer))
            if side == "chosen":
                kept = ids[0, 1:] != make_tokenizer().eos_token_id
                nll, scored = nll - logps[kept].sum(), scored + int(kept.sum())
        odds.append(torch.nn.functional.softplus(sides["rejected"] - sides["chosen"]))
    assert scored < sum(len(e["chosen_input_ids"]) - 1 for e in examples)
    expected = nll / scored + torch.stack(odds).mean()
    trainer.train()
    (first, *_) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert first == pytest.approx(expected.item(), rel=1e-6)


def test_other_ranks_print_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("orpo.ORPOConfig.should_log", property(lambda self: False))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        make_trainer(tmp_path)
    assert out.getvalue() == ""


@pytest.mark.parametrize("narrow", ["weights", "bf16", None])
def test_training_warns_where_bfloat16_would_be_emulated(narrow, tmp_path, bfloat16_cpu):
    model = make_model().to(torch.bfloat16 if narrow == "weights" else torch.float32)
    args = make_args(tmp_path, bf16=narrow == "bf16")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_emulation(model, args)
    said = ["no instructions for bfloat16" in str(w.message) for w in caught]
    assert any(said) == (narrow is not None and not bfloat16_cpu)


def test_the_trainer_passes_the_warning_on(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_logits, "multiplies_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match="Set dtype float32, and leave out bf16"):
        ORPOTrainer(
            make_model().bfloat16(), make_args(tmp_path), train_dataset=SEVEN, processing_class=make_tokenizer()
        )


def test_the_routers_coefficient_is_found_under_its_names():
    def model(**settings):
        return SimpleNamespace(config=LlamaConfig(**settings))

    assert router_coefficient(model()) == 0
    assert router_coefficient(model(router_aux_loss_coef=0.0, aux_loss_coef=0.5)) == 0
    assert router_coefficient(model(aux_loss_coef=0.25)) == 0.25
    assert router_coefficient(model(ffn_config=SimpleNamespace(moe_loss_weight=0.125))) == 0.125


def test_a_batch_is_filled_up_with_a_token_that_the_model_knows(tmp_path):
    model, tokenizer = make_model("llama"), make_tokenizer()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    assert pad_token_id(make_args(tmp_path), tokenizer, model) == tokenizer.pad_token_id
    beyond = SimpleNamespace(pad_token_id=vocabulary, eos_token_id=2)
    assert pad_token_id(make_args(tmp_path), beyond) == vocabulary
    assert pad_token_id(make_args(tmp_path), beyond, model) == 2
    for value in (vocabulary, -1):
        with pytest.raises(ValueError, match=f"padding_value is {value}, and the model has {vocabulary} embeddings"):
            make_trainer(tmp_path, model, padding_value=value)


def test_names_that_no_module_has_are_told(tmp_path):
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "v_porj"], modules_to_save=["lmhead"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="no such module") as caught:
        make_trainer(tmp_path, peft_config=config)
    told = [str(warning.message) for warning in caught if "no such module" in str(warning.message)]
    assert told == [
        "target_modules names v_porj, and the model has no such module: it is left out",
        "modules_to_save names lmhead, and the model has no such module: it is left out",
    ]
    config = peft.LoraConfig(target_modules=["mlp.up_proj", "lm_head"], modules_to_save=["norm"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*no such module")
        make_trainer(tmp_path, peft_config=config)
