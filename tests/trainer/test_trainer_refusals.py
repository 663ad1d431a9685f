"""Calls, tokenizers and collators that cannot train are refused in words."""

import datasets
import pytest
import torch
from tiny import SEVEN, make_model, make_tokenizer
from trainers import make_args, make_trainer

from orpo import ORPOTrainer

ANSWERS = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_dataset": None}, "neither train_dataset nor eval_dataset"),
        ({"processing_class": "both"}, "give one of them, not both"),
        ({"args": "TrainingArguments"}, "an orpo.ORPOConfig, not transformers.TrainingArguments: from orpo import"),
        ({"model_init_kwargs": {"dtype": "float32"}}, "model_init_kwargs is given, but the model is loaded already"),
        ({"peft_config": {"r": 3}}, "peft_config has to be a peft.PeftConfig, not dict"),
        ({"tokenizer": None}, "the model has no name to find its tokenizer by"),
    ],
)
def test_calls_that_are_refused(arguments, message, tmp_path):
    from transformers import TrainingArguments

    call = {"model": make_model("llama"), "train_dataset": SEVEN, "tokenizer": make_tokenizer(), **arguments}
    call["args"] = make_args(tmp_path, model_init_kwargs=call.pop("model_init_kwargs", None))
    if "args" in arguments:
        call["args"] = TrainingArguments(str(tmp_path))
    if "processing_class" in arguments:
        call["processing_class"] = make_tokenizer()
    with pytest.raises(ValueError, match=message):
        ORPOTrainer(**call)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the model has 64 embeddings"):
        make_trainer(tmp_path, model=make_model("llama", vocab_size=64))


def test_a_collator_of_another_kind_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, data_collator=lambda rows: {"input_ids": torch.tensor([[1, 2]])})
    with pytest.raises(ValueError, match=r"a batch has to hold 'orpo'.* gives \['input_ids'\]"):
        trainer.train()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "good": "b", "bad": "c"}],
            r"needs the columns 'chosen' and 'rejected'.*\['bad', 'good', 'pr",
        ),
        ([{"prompt": [{"role": "user", "content": "a"}], **ANSWERS}], "has no chat template"),
        ([{"prompt": "a", "chosen": "b", "rejected": ""}], "no row of the train set can train"),
    ],
    ids=["columns", "template", "rows"],
)
def test_data_that_cannot_train_is_refused_before_weights_are_read(rows, message, tmp_path):
    """The folder holds none."""
    make_model("llama").config.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        ORPOTrainer(str(tmp_path / "model"), make_args(tmp_path / "out"), train_dataset=rows)


def test_a_stream_without_a_pair_is_refused(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": ""}]).to_iterable_dataset()
    with pytest.raises(ValueError, match="no row of the stream can train: train: kept 0 of 1: 1 empty answer"):
        make_trainer(tmp_path, train_dataset=rows)


def test_a_bad_dtype_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype is 'float7'"):
        ORPOTrainer("anything", make_args(tmp_path, model_init_kwargs={"dtype": "float7"}), train_dataset=SEVEN)


def test_trls_config_is_refused_with_the_import_that_is_missing(tmp_path):
    theirs = pytest.importorskip("trl.experimental.orpo", reason="TRL is not installed").ORPOConfig
    args = theirs(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=r"not trl\.ORPOConfig: from orpo import ORPOConfig, which takes the same arg"):
        ORPOTrainer(make_model("llama"), args, train_dataset=SEVEN, processing_class=make_tokenizer())


def test_a_best_metric_that_an_evaluation_does_not_give_is_named_by_it(tmp_path):
    evaluating = {"eval_dataset": SEVEN, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "other"}
    with pytest.raises(ValueError, match=r"metric_for_best_model is 'other', and the evaluation has given .*eval_own"):
        make_trainer(tmp_path, compute_metrics=lambda _: {"own": 1.0}, **evaluating).train()
