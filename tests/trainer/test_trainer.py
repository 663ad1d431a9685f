"""TRL's run reproduced, exact accumulation, data and models as users bring them, and stops in words."""

import json
import re

import peft
import pytest
import torch
from datasets import Dataset
from record_trl_trace import EVALUATED, RUNS, SETTINGS, TRACE, trace_model, trace_pairs, trace_tokenizer
from tiny import CHATML, ROWS, SEVEN, make_model, make_tokenizer, reference_loss
from trainers import logged, make_args, make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from orpo import ORPOConfig, ORPOTrainer
from orpo.runs.non_finite import NonFiniteError

METRICS = {
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
    *("nll_loss", "log_odds_ratio", "log_odds_chosen"),
}


def trace_run(tmp_path, run, **changes):
    """TRL's recorded run of that name, and our trainer after the same run."""
    pairs = Dataset.from_list(trace_pairs())
    trainer = ORPOTrainer(
        model=trace_model(),
        args=ORPOConfig(output_dir=str(tmp_path), **{**SETTINGS, **RUNS[run], **changes}),
        train_dataset=pairs,
        eval_dataset=pairs.select(range(EVALUATED)),
        processing_class=trace_tokenizer(),
    )
    trainer.train()
    return json.loads(TRACE.read_text())["runs"][run], trainer


def assert_same_metrics(ours, theirs):
    # TRL averages logits over padding too, and evaluation losses over batches.
    left_out = {"logits/chosen", "logits/rejected", "eval_logits/chosen", "eval_logits/rejected"}
    left_out |= {"eval_loss", "eval_nll_loss"}
    for name in theirs.keys() - left_out:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name


def assert_same_log(trainer, trace):
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == len(trace["log"]) == 6
    for ours, theirs in zip(steps, trace["log"], strict=True):
        assert_same_metrics(ours, theirs)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("run", ["plain", "unclipped"])
def test_trls_run_is_reproduced(run, layout, tmp_path):
    trace, trainer = trace_run(tmp_path, run, layout=layout)
    assert_same_log(trainer, trace)
    evaluation = trainer.evaluate()
    assert_same_metrics(evaluation, trace["eval"])
    expected = reference_loss(trainer.model, list(trainer.eval_dataset), beta=trainer.args.beta).item()
    assert evaluation["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_accumulation_equals_the_large_batch_where_trls_does_not(tmp_path):
    trace, trainer = trace_run(tmp_path, "accumulated")
    whole = json.loads(TRACE.read_text())["runs"]["plain"]
    assert_same_log(trainer, whole)
    assert abs(trace["log"][1]["loss"] - whole["log"][1]["loss"]) > 1e-2


def test_normalization_by_micro_batch_is_trls(tmp_path):
    trace, trainer = trace_run(tmp_path, "accumulated", normalization="micro_batch")
    assert_same_log(trainer, trace)


@pytest.mark.parametrize("size", [1, 2])
def test_accumulated_gradients_are_those_of_the_large_batch(size, tmp_path):
    """Unequal lengths, with the whole step's gradient compared through one SGD step."""

    def step(size):
        trainer = make_trainer(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0,
            train_dataset={name: column[:4] for name, column in SEVEN.items()},
        )
        trainer.train()
        return logged(trainer, "loss"), logged(trainer, "nll_loss"), trainer.model.state_dict()

    (loss, nll, weights), (large_loss, large_nll, large_weights) = step(size), step(4)
    assert loss == pytest.approx(large_loss, rel=1e-6) and nll == pytest.approx(large_nll, rel=1e-6)
    for name, weight in weights.items():
        assert torch.allclose(weight, large_weights[name], atol=1e-7), name


def test_the_seed_example_runs(tmp_path, capsys):
    """`tokenizer=`, a dict of lists, a model as it is: the call of the talk that introduces ORPO."""
    orpo_config = make_args(tmp_path, beta=0.1)
    orpo_trainer = ORPOTrainer(
        make_model("llama"),
        args=orpo_config,
        train_dataset=SEVEN,
        tokenizer=make_tokenizer(),
    )
    orpo_trainer.train()
    (first, *_) = [entry for entry in orpo_trainer.state.log_history if "loss" in entry]
    assert METRICS <= first.keys()
    assert first["loss"] == pytest.approx(first["nll_loss"] - 0.1 * first["log_odds_ratio"], rel=1e-6)
    out = capsys.readouterr().out
    assert "train: kept 7 of 7" in out and "what each term scores" in out


@pytest.mark.parametrize(("preset", "span"), [("trl", True), ("response_only", False)])
def test_first_loss_is_the_definition(preset, span, tmp_path):
    trainer = make_trainer(tmp_path, preset=preset, beta=0.7, per_device_train_batch_size=7, max_steps=1)
    expected = reference_loss(make_model("llama"), list(trainer.train_dataset), beta=0.7, prompt_in_nll=span)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(expected.item(), rel=1e-6)


def test_evaluation_weighs_tokens_and_pairs(tmp_path):
    """Three batches of unequal size give the loss of the whole set; metrics carry the prefix."""
    trainer = make_trainer(tmp_path, eval_dataset={"one": SEVEN, "two": SEVEN}, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    expected = reference_loss(make_model("llama"), list(trainer.train_dataset)).item()
    assert metrics["eval_one_loss"] == metrics["eval_two_loss"] == pytest.approx(expected, rel=1e-6)
    assert {f"eval_one_{name}" for name in METRICS} <= metrics.keys()


def test_evaluation_weighs_the_nll_as_training_does(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=SEVEN, nll_weight=0.3, beta=0.7)
    pairs = list(trainer.train_dataset)
    nll, both = (reference_loss(make_model("llama"), pairs, beta=beta).item() for beta in (0.0, 0.7))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.3 * nll + both - nll, rel=1e-6)


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_tokens_seen_are_those_that_are_no_padding(layout, tmp_path):
    """In the shared layout a prompt is seen once, and so is an answer that several of its pairs have."""
    counted = {"include_num_input_tokens_seen": "non_padding", "per_device_train_batch_size": 7, "max_steps": 1}
    trainer = make_trainer(tmp_path, layout=layout, **counted)
    trainer.train()
    pairs = list(trainer.train_dataset)
    sequences = [
        (ids, p["chosen_prompt_length"]) for p in pairs for ids in (p["chosen_input_ids"], p["rejected_input_ids"])
    ]
    expected = sum(len(ids) for ids, _ in sequences)
    if layout == "shared":
        answers = {(tuple(ids[:at]), tuple(ids[at:])) for ids, at in sequences}
        expected = sum(map(len, {prompt for prompt, _ in answers})) + sum(len(answer) for _, answer in answers)
    assert trainer.state.num_input_tokens_seen == expected


def test_compute_metrics_sees_log_probabilities(tmp_path):
    def share(prediction):
        assert prediction.predictions.shape == (7, 2)
        return {"share": float((prediction.predictions[:, 0] > prediction.predictions[:, 1]).mean())}

    trainer = make_trainer(tmp_path, eval_dataset=SEVEN, compute_metrics=share, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    assert metrics["eval_share"] == pytest.approx(metrics["eval_rewards/accuracies"])


def test_checkpoint_reloads_and_resumes(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "seed": 7}
    trainer = make_trainer(tmp_path / "a", **settings)
    trainer.train()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a/checkpoint-4")
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, reloaded.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path / "a/checkpoint-4")("hello")["input_ids"]
    # As if the run had been killed while it wrote its last checkpoint.
    (tmp_path / "a/checkpoint-4/trainer_state.json").write_text('{"half": ')
    resumed = make_trainer(tmp_path / "a", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert logged(resumed, "loss") == pytest.approx(logged(trainer, "loss"), rel=1e-6)


def test_resuming_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_model_by_name_brings_its_tokenizer(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer(chat_template=CHATML).save_pretrained(tmp_path / "model")
    conversations = [
        {
            side: [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            for side, text in (("chosen", chosen), ("rejected", rejected))
        }
        for prompt, chosen, rejected in zip(*SEVEN.values(), strict=True)
    ]
    args = make_args(tmp_path, model_init_kwargs={"dtype": "float32"})
    trainer = ORPOTrainer(str(tmp_path / "model"), args, train_dataset=conversations)
    trainer.train()
    assert len(logged(trainer, "loss")) == 2


def test_lora_trains_the_adapter_alone(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.1, task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, peft_config=config, save_strategy="steps", save_steps=2, max_steps=2)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert any("lm_head" in name for name in changed)
    assert (tmp_path / "checkpoint-2/adapter_model.safetensors").is_file()


def test_mixed_precision_keeps_float32_weights(tmp_path):
    trainer, plain = (make_trainer(tmp_path, bf16=bf16) for bf16 in (True, False))
    for run in (trainer, plain):
        run.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert logged(trainer, "loss") == pytest.approx(logged(plain, "loss"), rel=2e-2)
    assert logged(trainer, "loss") != logged(plain, "loss")


@pytest.mark.parametrize("size", [4, 1])
def test_router_loss_is_added_as_trl_adds_it(size, tmp_path):
    """As the mean of its micro-batches."""
    experts = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
    trainer = make_trainer(tmp_path, model=make_model("mixtral", **experts), eval_dataset=SEVEN, **sizes)
    evaluation = trainer.evaluate()
    trainer.train()
    (entry,) = [e for e in trainer.state.log_history if "loss" in e]
    orpo = entry["nll_loss"] - 0.1 * entry["log_odds_ratio"]
    # A router that spreads four experts' tokens evenly has a load-balancing loss of 2 with two experts a token.
    assert 0.5 * 1.8 < entry["loss"] - orpo < 0.5 * 3
    orpo = evaluation["eval_nll_loss"] - 0.1 * evaluation["eval_log_odds_ratio"]
    assert 0.5 * 1.8 < evaluation["eval_loss"] - orpo < 0.5 * 3


def test_dropout_is_off_unless_asked_for(tmp_path):
    off = make_trainer(tmp_path, model=make_model("gpt2", n_embd=32, n_layer=2, n_head=4))
    assert {m.p for m in off.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    on = make_trainer(tmp_path, model=make_model("gpt2", n_embd=32, n_layer=2, n_head=4), disable_dropout=False)
    assert {m.p for m in on.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


def logits_of_rows(model, example):
    """Mean logits of the scored rows of each side, (sum, count) from the model's own, in double precision."""
    sums = []
    for side, first in (("chosen", 0), ("rejected", example["rejected_prompt_length"] - 1)):
        with torch.no_grad():
            logits = model(torch.tensor([example[f"{side}_input_ids"]])).logits[0, first:-1].double().mean(1)
        sums.append((logits.sum().item(), len(logits)))
    return sums


@pytest.mark.parametrize("logging", [{"logging_steps": 3}, {"logging_strategy": "epoch"}], ids=["steps", "epoch"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_mean_logits_are_those_of_all_steps_since_the_last_log_however_a_step_is_split(size, logging, tmp_path):
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "layout": "padded"}
    rows = {name: column * 2 for name, column in SEVEN.items()}
    rows = {name: column[:12] for name, column in rows.items()}
    # Weights that stay make every step's mean one of the same model.
    trainer = make_trainer(tmp_path, train_dataset=rows, max_steps=3, learning_rate=0.0, **settings, **logging)
    steps, run = {}, trainer._run

    def noted(model, inputs, *arguments, **options):
        steps.setdefault(trainer.state.global_step, []).extend(inputs["orpo"].pair_ids.tolist())
        return run(model, inputs, *arguments, **options)

    trainer._run = noted
    trainer.train()
    model, examples = make_model("llama"), list(trainer.train_dataset)
    for i, side in enumerate(("chosen", "rejected")):
        means = []
        for ids in steps.values():
            sums, counts = zip(*(logits_of_rows(model, examples[j])[i] for j in ids), strict=True)
            means.append(sum(sums) / sum(counts))
        assert len(means) == 3
        assert logged(trainer, f"logits/{side}") == [pytest.approx(sum(means) / 3, rel=1e-4, abs=1e-6)]


def test_diagnosis_belongs_to_an_epoch_that_is_logged_too(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=2, max_steps=-1, logging_strategy="epoch", diagnose=True)
    trainer.train()
    assert len(logged(trainer, "diagnose/grad_norm_nll")) == 2


@pytest.mark.parametrize("form", ["dict", "rows", "dataset", "stream", "named", "named stream"])
def test_pairs_as_they_come_are_evaluated_and_predicted(form, tmp_path, capsys):
    stream = Dataset.from_dict(SEVEN).to_iterable_dataset()
    data = {"dict": SEVEN, "rows": ROWS, "dataset": Dataset.from_dict(SEVEN), "stream": stream}
    data |= {"named": {"x": ROWS}, "named stream": {"x": stream}}
    trainer = make_trainer(tmp_path, eval_dataset=SEVEN)
    expected = trainer.evaluate()["eval_loss"]
    capsys.readouterr()
    metrics = trainer.evaluate(data[form])
    assert metrics["eval_x_loss" if "named" in form else "eval_loss"] == expected
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == expected
    said = capsys.readouterr().out
    if "named" in form:
        return
    assert "kept 7 of 7" in said
    predicted = trainer.predict(data[form])
    assert predicted.metrics["test_loss"] == expected and predicted.predictions.shape == (7, 2)
    assert "test, a stream, so far as it was read: kept 7 of 7" in capsys.readouterr().out or form != "stream"


def test_pairs_of_another_tokenizer_are_refused_in_evaluation_too(tmp_path):
    trainer = make_trainer(tmp_path)
    alien = {"chosen_input_ids": [[1, 999]], "rejected_input_ids": [[1, 2]], "length": [4], "pair_id": [0]}
    alien |= {"chosen_prompt_length": [1], "rejected_prompt_length": [1]}
    with pytest.raises(ValueError, match="token id 999"):
        trainer.evaluate(Dataset.from_dict(alien))


def test_compute_metrics_is_given_the_losses_it_asks_for(tmp_path):
    seen = []

    def compute(prediction):
        seen.append(prediction.losses)
        return {}

    trainer = make_trainer(
        tmp_path,
        eval_dataset=SEVEN,
        compute_metrics=compute,
        include_for_metrics=["loss"],
        per_device_eval_batch_size=3,
    )
    loss = trainer.evaluate()["eval_loss"]
    examples, model = list(trainer.eval_dataset), make_model("llama")
    batches = [reference_loss(model, examples[i : i + 3]).item() for i in (0, 3, 6)]
    assert seen[0].tolist() == pytest.approx([*[batches[0]] * 3, *[batches[1]] * 3, batches[2]], rel=1e-5)
    assert loss == pytest.approx(reference_loss(model, examples).item(), rel=1e-6)


def test_a_stream_trains(tmp_path):
    stream = Dataset.from_dict(SEVEN).to_iterable_dataset()
    trainer = make_trainer(tmp_path, train_dataset=stream, max_steps=3)
    trainer.train()
    assert len(logged(trainer, "loss")) == 3


def poison(trainer, token):
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[token] = float("nan")


def test_a_nan_stops_the_run_before_the_weights_change(tmp_path):
    # In the shared layout pairs of one prompt lie in one row, whose attention takes a NaN to all of them.
    trainer = make_trainer(tmp_path, per_device_train_batch_size=7, layout="padded")
    used = [set(e["chosen_input_ids"] + e["rejected_input_ids"]) for e in trainer.train_dataset]
    # A token of the sixth pair that the first five do not have; the seventh may.
    token = min(used[5] - set().union(*used[:5]))
    poison(trainer, token)
    head = trainer.model.lm_head.weight.clone()
    with pytest.raises(NonFiniteError, match="loss of step 1 on rank 0 is not finite") as error:
        trainer.train()
    (rows,) = re.findall(r"rows \[(.*?)\]", str(error.value))
    assert {int(row) for row in rows.split(", ")} == {i for i, tokens in enumerate(used) if token in tokens}
    assert torch.equal(head, trainer.model.lm_head.weight)
    assert not logged(trainer, "loss")


def test_a_nan_in_a_rejected_answer_names_its_pair(tmp_path):
    # Padded, since in a shared row the chosen answer would be NaN as well.
    trainer = make_trainer(tmp_path, per_device_train_batch_size=7, layout="padded")
    pairs = list(trainer.train_dataset)
    of_the_second = set(pairs[1]["rejected_input_ids"])
    poison(trainer, min(of_the_second - {i for p in pairs for i in p["chosen_input_ids"]}))
    with pytest.raises(NonFiniteError, match=r"loss of step 1 on rank 0 is not finite: rows \[1\] of the data set"):
        trainer.train()


def test_a_nan_in_the_gradient_alone_stops_the_run_too(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    head = trainer.model.lm_head.weight.clone()
    with pytest.raises(NonFiniteError, match="the gradient of step 1 is not finite, though rank 0's losses are"):
        trainer.train()
    assert torch.equal(head, trainer.model.lm_head.weight)


@pytest.mark.parametrize("arguments", [0, 1])
def test_a_model_made_by_model_init(arguments, tmp_path):
    made = []

    def make(*trial):
        made.append(trial)
        return make_model("llama")

    model_init = (lambda: make()) if arguments == 0 else (lambda trial: make(trial))
    data = {"train_dataset": SEVEN, "processing_class": make_tokenizer()}
    trainer = ORPOTrainer(model_init=model_init, args=make_args(tmp_path), **data)
    trainer.train()
    assert len(made) > 0 and all(len(trial) == arguments for trial in made)
    assert len(logged(trainer, "loss")) == 2


def test_what_is_left_of_a_stream_is_no_part_of_the_next_step(tmp_path):
    """Five micro-batches of one pair, two of them a step: the fifth trains in neither epoch."""
    settings = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=4, learning_rate=1e-2)
    runs = []
    for rows in (5, 4):
        stream = Dataset.from_dict(SEVEN).select(range(rows)).to_iterable_dataset()
        trainer = make_trainer(tmp_path, train_dataset=stream, **settings)
        trainer.train()
        runs.append([logged(trainer, name) for name in ("loss", "grad_norm", "nll_loss")])
    assert len(runs[0][0]) == 4 and runs[0] == runs[1]


def test_what_the_trainer_changes_of_transformers_has_one_home():
    """Each method of Trainer is overridden once: who reads it need not follow it through the bases."""
    own = ORPOTrainer.__mro__[: ORPOTrainer.__mro__.index(Trainer)]
    homes = {name: [c.__name__ for c in own if name in vars(c)] for c in own for name in vars(c)}
    assert len(own) == 6 and homes["train"] == ["ORPOTrainer"]
    # What every class has, and __init__, which each of them adds to.
    ours = {name: found for name, found in homes.items() if not name.startswith("__")}
    assert not {name: found for name, found in ours.items() if len(found) > 1}
