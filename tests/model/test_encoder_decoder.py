"""Encoder-decoders: TRL's loss and run, one run of the encoder a pair, the head's scale and bias, saved and resumed."""

import itertools
import json

import peft
import pytest
import torch
from datasets import Dataset
from tiny import ENCODER_DECODERS, ROWS, SEVEN, log_odds, make_encoder_decoder, make_encoder_tokenizer, make_tokenizer
from trainers import logged, make_args, make_trainer
from transformers import AutoModelForSeq2SeqLM

from orpo import ORPOTrainer, train
from orpo import generate as command
from orpo.data.encoder_decoder import EncoderDecoderTokenizer
from orpo.data.prepare import Limits, prepare_dataset
from orpo.generation import generate, load
from orpo.layouts.batch import NLLSpan
from orpo.layouts.encoder_decoder import EncoderDecoderLayout
from orpo.model.attach import attach_orpo_loss
from orpo.model.probe import check_fused_logps

BART = "<s> $A </s>"
# Padded differently in each batch; the second prompt is the longest, the first answer the shortest.
PAIRS = {name: column[:6] for name, column in SEVEN.items()}


def tokenizer_of(model_type):
    return make_encoder_tokenizer(BART if model_type == "bart" else "$A </s>")


def encoder_trainer(tmp_path, model_type="t5", model=None, **settings):
    model = make_encoder_decoder(model_type) if model is None else model
    return make_trainer(tmp_path, model=model, tokenizer=tokenizer_of(model_type), **settings)


def reference_loss(model, examples, beta=0.1):
    """The loss in double precision, from the model's own logits of one answer at a time."""
    nll, tokens, terms = 0.0, 0, []
    for example in examples:
        odds = {}
        for side in ("chosen", "rejected"):
            ids, prompt = example[f"{side}_input_ids"], example[f"{side}_prompt_length"]
            labels = torch.tensor([ids[prompt:]])
            logits = model(input_ids=torch.tensor([ids[:prompt]]), labels=labels).logits[0].double()
            logps = logits.log_softmax(-1).gather(-1, labels[0, :, None])[:, 0]
            odds[side] = log_odds(logps.mean())
            if side == "chosen":
                nll, tokens = nll - logps.sum(), tokens + len(logps)
        terms.append(-torch.nn.functional.logsigmoid(odds["chosen"] - odds["rejected"]))
    return nll / tokens + beta * torch.stack(terms).mean()


def loss_of(trainer, batch=None):
    batch = next(iter(trainer.get_train_dataloader())) if batch is None else batch
    return trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["orpo"].counts)


def test_a_pair_becomes_one_prompt_and_two_answers(tmp_path):
    pairs = [{"prompt": "hello", "chosen": "hi nice", "rejected": "leave"}]
    trainer = encoder_trainer(tmp_path, "bart", train_dataset=pairs)
    (row,) = trainer.train_dataset
    tokens = tokenizer_of("bart")
    prompt, chosen, rejected = (tokens(pairs[0][name])["input_ids"] for name in ("prompt", "chosen", "rejected"))
    assert prompt[0] == chosen[0] == 1 and prompt[-1] == chosen[-1] == 2
    assert row["chosen_input_ids"] == prompt + chosen and row["rejected_input_ids"] == prompt + rejected
    batch = trainer.data_collator([row])
    assert batch["input_ids"].tolist() == [prompt] and batch["attention_mask"].tolist() == [[1] * len(prompt)]
    width = max(len(chosen), len(rejected))
    assert batch["labels"].tolist() == [ids + [-100] * (width - len(ids)) for ids in (chosen, rejected)]
    rows = batch["orpo"].rows
    assert rows.rows_N.tolist() == [*range(len(chosen)), *range(width, width + len(rejected))]
    assert rows.targets_N.tolist() == chosen + rejected and rows.in_response_N.all()
    assert rows.in_nll_N.tolist() == [True] * len(chosen) + [False] * len(rejected)
    assert batch["orpo"].counts == (len(chosen), 1, len(chosen), len(rejected))
    # A mask that comes with the row: the second token of the chosen answer counts for nothing.
    mask = [0] * len(prompt) + [1, -1] + [1] * (len(chosen) - 2)
    masked = trainer.data_collator([{**row, "chosen_mask": mask}])["orpo"]
    assert masked.rows.targets_N.tolist() == chosen[:1] + chosen[2:] + rejected
    assert masked.counts == (len(chosen) - 1, 1, len(chosen) - 1, len(rejected))
    # The paper's code scores no end-of-sequence token.
    assert int(EncoderDecoderLayout(0, NLLSpan(True, 2))([row])["orpo"].rows.in_nll_N.sum()) == len(chosen) - 1


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
def test_long_texts_are_cut_within_their_special_tokens(mode, tmp_path):
    row = {"prompt": "abcdefgh", "chosen": "ijklmnop", "rejected": "x"}
    options = {"max_prompt_length": 5, "max_completion_length": 4, "truncation_mode": mode}
    trainer = encoder_trainer(tmp_path, "bart", train_dataset=[row], **options)
    tokens = tokenizer_of("bart")
    plain = {name: tokens(text, add_special_tokens=False)["input_ids"] for name, text in row.items()}
    assert len(plain["prompt"]) > 5 and len(plain["chosen"]) > 4
    kept = plain["prompt"][-3:] if mode == "keep_end" else plain["prompt"][:3]
    prompt, chosen = [1, *kept, 2], [1, *plain["chosen"][:2], 2]
    assert trainer.train_dataset[0]["chosen_input_ids"] == prompt + chosen
    # The answer as TRL cuts it.
    assert chosen == tokens(row["chosen"], truncation=True, max_length=4)["input_ids"]


def test_an_answer_learns_to_end_where_the_tokenizer_has_no_end_of_its_own(tmp_path):
    trainer = make_trainer(tmp_path, model=make_encoder_decoder("t5"), tokenizer=make_tokenizer(bos_token=None))
    for row in trainer.train_dataset:
        assert row["chosen_input_ids"][-1] == row["rejected_input_ids"][-1] == 2
        assert 2 not in row["chosen_input_ids"][:-1]


@pytest.mark.parametrize("model_type", [*ENCODER_DECODERS])
def test_the_loss_and_its_gradient_are_those_of_the_models_own_logits(model_type, tmp_path):
    """T5 scales what its tied head reads; BART and its kin add a bias to the logits, which is not zero here."""
    model = make_encoder_decoder(model_type)
    trainer = encoder_trainer(tmp_path, model_type, model=model, per_device_train_batch_size=7)
    expected = reference_loss(model, list(trainer.train_dataset))
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = loss_of(trainer)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(gradients) > 20
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_the_probe_refuses_a_head_without_its_scale_or_bias(model_type, monkeypatch):
    model = make_encoder_decoder(model_type)
    attach_orpo_loss(model)
    assert check_fused_logps(model) < 1e-5
    if model_type == "bart":
        monkeypatch.setattr("orpo.model.attach.added_bias", lambda model: None)
    else:
        # What T5's head is given is what the decoder made, by d_model**-0.5.
        own = model.lm_head.forward
        model.lm_head.forward = lambda hidden, **given: own(hidden * 32**0.5 if given else hidden, **given)
    with pytest.raises(ValueError, match="training would be silently wrong"):
        check_fused_logps(model)


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_the_encoder_runs_once_a_pair(model_type, evaluates, tmp_path):
    trainer = encoder_trainer(tmp_path, model_type, eval_dataset=PAIRS, per_device_train_batch_size=6, max_steps=1)
    rows = []
    trainer.model.get_encoder().register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    if evaluates:
        trainer.evaluate()
        assert rows == [6]
        return
    trainer.train()
    # Gradient checkpointing, on by default, recomputes layers, not the stack that they are in.
    assert rows == [6]


def trl_trainer(tmp_path, model_type, **settings):
    trl = pytest.importorskip("trl.experimental.orpo")
    defaults = {"max_steps": 20, "per_device_train_batch_size": 3, "learning_rate": 1e-3, "logging_steps": 1}
    args = trl.ORPOConfig(
        output_dir=str(tmp_path / "trl"),
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        report_to="none",
        **{**defaults, **settings},
    )
    pairs, tokenizer = Dataset.from_dict(PAIRS), tokenizer_of(model_type)
    # Of dropout, TRL switches off modules alone, and both models call the function too.
    model = make_encoder_decoder(model_type, **{"dropout_rate" if model_type == "t5" else "dropout": 0.0})
    return trl.ORPOTrainer(model, args, train_dataset=pairs, eval_dataset=pairs, processing_class=tokenizer)


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_loss_and_gradients_are_trls(model_type, tmp_path):
    theirs = trl_trainer(tmp_path, model_type, train_sampling_strategy="sequential")
    settings = {"per_device_train_batch_size": 3, "train_sampling_strategy": "sequential"}
    ours = encoder_trainer(tmp_path / "ours", model_type, train_dataset=PAIRS, **settings)
    for mine, other in zip(ours.get_train_dataloader(), theirs.get_train_dataloader(), strict=True):
        losses = [loss_of(ours, mine), theirs.compute_loss(theirs.model, other)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        for trainer, loss in zip((ours, theirs), losses, strict=True):
            trainer.model.zero_grad()
            loss.backward()
        other_gradients = dict(theirs.model.named_parameters())
        for name, parameter in ours.model.named_parameters():
            torch.testing.assert_close(parameter.grad, other_gradients[name].grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_trls_run_is_reproduced_for_twenty_steps(model_type, tmp_path):
    theirs = trl_trainer(tmp_path, model_type)
    theirs.train()
    settings = {"max_steps": 20, "per_device_train_batch_size": 3}
    ours = encoder_trainer(tmp_path / "ours", model_type, train_dataset=PAIRS, eval_dataset=PAIRS, **settings)
    ours.train()
    steps = [[entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, theirs)]
    names = {"loss", "grad_norm", "nll_loss", "log_odds_ratio", "log_odds_chosen", "logps/chosen", "logps/rejected"}
    names |= {"rewards/margins", "rewards/accuracies", "learning_rate"}
    assert len(steps[0]) == len(steps[1]) == 20
    assert steps[0][-1]["loss"] < 0.95 * steps[0][0]["loss"]
    for mine, other in zip(*steps, strict=True):
        for name in names:
            assert mine[name] == pytest.approx(other[name], rel=2e-4, abs=1e-5), name


def test_evaluation_is_the_mean_over_the_set(tmp_path):
    trainer = encoder_trainer(tmp_path, eval_dataset=SEVEN, per_device_eval_batch_size=3)
    expected = reference_loss(trainer.model, list(trainer.eval_dataset)).item()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.predict(SEVEN).predictions.shape == (7, 2)


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_saved_resumed_and_asked(model_type, tmp_path, capsys):
    settings = {"max_steps": 60, "per_device_train_batch_size": 7, "learning_rate": 1e-2, "train_dataset": SEVEN}
    settings |= {"save_strategy": "steps", "save_steps": 30, "generate_during_eval": True, "eval_dataset": PAIRS}
    whole = encoder_trainer(tmp_path / "out", model_type, **settings)
    out = capsys.readouterr().out
    assert "layout padded: the encoder reads each prompt once" in out
    shown = " ".join(out.split())
    assert "nothing (encoder)" in shown and "'hello</s>'" in shown.replace("<s>hello", "hello")
    whole.train()
    whole.evaluate()
    assert '"prompt"' in (tmp_path / "out" / "samples.jsonl").read_text()
    again = encoder_trainer(tmp_path / "out", model_type, **settings)
    again.train(str(tmp_path / "out" / "checkpoint-30"))
    assert logged(again, "loss") == logged(whole, "loss")
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True))

    again.save_model()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "text2text-generation" in card and "the NLL scores chosen answer alone" in card
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), again.model.parameters(), strict=True))
    model, tokenizer = load(str(tmp_path / "out"))
    prompts = ["hello", "how are you", "What is your name?"]
    answers = generate(model, tokenizer, prompts, max_new_tokens=20, batch_size=3)
    # Learned by heart: without the prompt, ended, and the same alone as in a batch that is filled up.
    assert answers == ["hi nice to meet you", "I am fine", "My name is Mary"]
    assert not any(answer.cut for answer in answers)
    assert answers == [generate(model, tokenizer, [prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert generate(model, tokenizer, prompts[:1], max_new_tokens=2)[0].cut


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_an_answer_does_not_depend_on_the_other_prompts_of_its_batch(model_type):
    """BART counts positions from the row's first token: filled up in front, a prompt would stand elsewhere."""
    model, tokenizer = make_encoder_decoder(model_type), tokenizer_of(model_type)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Much of what is answered is from the encoder then, and much of that by position.
            if "encoder_attn" in name or "embed_positions" in name or "EncDecAttention" in name:
                parameter.mul_(8)
        if model_type == "bart":
            model.final_logits_bias.zero_()
    prompts = SEVEN["prompt"][:4] + SEVEN["chosen"]
    alone = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=1)
    assert len(set(alone)) > 5
    assert generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=20) == alone


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_trains_the_same(checkpointing, tmp_path):
    plain = encoder_trainer(tmp_path, gradient_checkpointing=False, train_dataset=PAIRS)
    plain.train()
    other = encoder_trainer(tmp_path, "t5", gradient_checkpointing=checkpointing, train_dataset=PAIRS)
    other.train()
    assert logged(other, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-6)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_an_adapter_is_trained_and_loaded_again(model_type, head, tmp_path):
    make_encoder_decoder(model_type, **({"tie_word_embeddings": False} if head else {})).save_pretrained(
        tmp_path / "base"
    )
    tokenizer_of(model_type).save_pretrained(tmp_path / "base")
    attention = ["q", "v"] if model_type == "t5" else ["q_proj", "v_proj"]
    lora = peft.LoraConfig(r=4, target_modules=[*attention, *(["lm_head"] if head else [])], init_lora_weights=False)
    args = make_args(tmp_path / "out", max_steps=3, learning_rate=1e-2)
    trainer = ORPOTrainer(str(tmp_path / "base"), args, train_dataset=SEVEN, peft_config=lora)
    assert trainer.model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    batch = next(iter(trainer.get_train_dataloader()))
    examples = [trainer.train_dataset[int(i)] for i in batch["orpo"].pair_ids]
    expected = reference_loss(trainer.model, examples).item()
    assert loss_of(trainer, batch).item() == pytest.approx(expected, rel=1e-5)
    trainer.train()
    trainer.save_model()
    model, tokenizer = load(str(tmp_path / "out"))
    assert isinstance(model, peft.PeftModelForSeq2SeqLM)
    assert reference_loss(model, examples).item() == pytest.approx(
        reference_loss(trainer.model, examples).item(), rel=1e-5
    )
    assert len(generate(model, tokenizer, ["hello"], max_new_tokens=3)) == 1


def test_what_no_encoder_decoder_can_do_is_said(tmp_path):
    for layout in ("shared", "packed"):
        with pytest.raises(ValueError, match=f"layout is '{layout}', and T5ForConditionalGeneration is an encoder-dec"):
            encoder_trainer(tmp_path, layout=layout)
    with pytest.raises(ValueError, match=r"task_type is CAUSAL_LM, and T5For.* has to be SEQ_2_SEQ_LM"):
        encoder_trainer(tmp_path, peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q"]))
    with pytest.raises(ValueError, match="escape_special_tokens is true, and the model is an encoder-decoder"):
        encoder_trainer(tmp_path, escape_special_tokens=True)
    options = {"train_dataset": SEVEN, "processing_class": tokenizer_of("t5")}
    with pytest.raises(ValueError, match=r"is_encoder_decoder is None, and model_init makes a T5For.*set it to True"):
        ORPOTrainer(args=make_args(tmp_path), model_init=lambda: make_encoder_decoder("t5"), **options)
    prepared = {
        "chosen_input_ids": [[5, 2, 7, 2]],
        "rejected_input_ids": [[6, 2, 8, 2]],
        "chosen_prompt_length": [2],
        "rejected_prompt_length": [2],
    }
    with pytest.raises(ValueError, match="two prompts that differ, and an encoder reads one"):
        encoder_trainer(tmp_path, train_dataset=Dataset.from_dict(prepared))
    switch = make_encoder_decoder("t5")
    switch.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits, whose router's loss"):
        attach_orpo_loss(switch)


def test_the_commands_train_merge_and_answer(tmp_path, capsys):
    make_encoder_decoder("bart").save_pretrained(tmp_path / "bart")
    tokenizer_of("bart").save_pretrained(tmp_path / "bart")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    line = f"--model_name_or_path {tmp_path / 'bart'} --dataset_name {tmp_path / 'pairs.jsonl'} --max_steps 2 --use_cpu"
    line += f" --output_dir {tmp_path / 'out'} --use_peft --lora_target_modules q_proj v_proj --merge_adapter"
    with pytest.raises(ValueError, match="--lora_task_type SEQ_2_SEQ_LM"):
        train.main(line.split())
    train.main([*line.split(), "--lora_task_type", "SEQ_2_SEQ_LM", "--report_to", "none"])
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out" / "merged")
    assert merged.final_logits_bias.abs().max() > 1
    for folder in ("out", "out/merged"):
        capsys.readouterr()
        command.main([str(tmp_path / folder), "--prompt", "hello", "--max_new_tokens", "3"])
        answer = capsys.readouterr().out
        assert len(answer) > 1 and "hello" not in answer


@pytest.mark.parametrize(("model_type", "lacks"), itertools.product(("t5", "bart"), ("pad", "decoder_start")))
def test_a_config_without_the_decoders_first_token_is_told_before_training(model_type, lacks):
    model = make_encoder_decoder(model_type)
    setattr(model.config, f"{lacks}_token_id", None)
    with pytest.raises(ValueError, match=r"set decoder_start_token_id and pad_token_id in the model's config"):
        attach_orpo_loss(model)


def test_a_model_made_by_model_init(tmp_path):
    args = make_args(tmp_path, is_encoder_decoder=True)
    trainer = ORPOTrainer(
        args=args, model_init=lambda: make_encoder_decoder("bart"), train_dataset=SEVEN, tokenizer=tokenizer_of("bart")
    )
    trainer.train()
    assert len(logged(trainer, "loss")) == 2


def test_no_full_logits_are_made(tmp_path):
    """Of the tensors of a step none holds a number for each answer token and each token of the vocabulary."""
    trainer = encoder_trainer(tmp_path, train_dataset=PAIRS, logits_budget=0, strip_bytes=4 * 64 * 30)
    batch = next(iter(trainer.get_train_dataloader()))
    rows, seen = len(batch["orpo"].rows.rows_N), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t))
            return out

    with Watch():
        loss_of(trainer, batch).backward()
    assert rows * 400 > max(itertools.chain(seen, [400 * 32]))


def test_what_is_left_out_of_a_prompt_takes_no_answer_away():
    """The decoder writes none of it. An answer of several turns stays one that cannot be trained."""
    tokenizer = make_encoder_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    user, other = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}
    good, bad = ({"role": "assistant", "content": text} for text in ("yes", "no"))
    plain = {"prompt": [user, other, user], "chosen": [good], "rejected": [bad]}
    flagged = {**plain, "prompt": [{**user, "weight": 0}, {**other, "train": False}, user]}
    several = {**plain, "prompt": [user], "chosen": [other, user, good]}
    lines = []
    rows = prepare_dataset(
        [plain, flagged, several], tokenizer, Limits(), pair_tokenizer=EncoderDecoderTokenizer, report=lines.append
    )
    assert lines == ["train: kept 2 of 3: 1 answer of several turns, for an encoder-decoder (row 2)"]
    assert rows[0]["chosen_input_ids"] == rows[1]["chosen_input_ids"]
