"""Answers written at each evaluation, and a run that ends when it no longer helps."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny import CHATML, ROWS, SEVEN, make_model, make_tokenizer
from trainers import logged, make_args, make_trainer

from orpo.generation import generate
from orpo.trainer.samples import EvalSamples

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def sampling(tmp_path, **settings):
    defaults = {"eval_dataset": SEVEN, "generate_during_eval": True, "eval_max_new_tokens": 8, **EVERY_STEP}
    return make_trainer(tmp_path, **{**defaults, **settings})


@pytest.mark.parametrize("template", [None, CHATML])
def test_samples_are_the_models_own_greedy_answers(tmp_path, template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    data = SEVEN
    if template is not None:
        sides = ("chosen", "rejected")
        data = [
            {"prompt": [{"role": "user", "content": row["prompt"]}]}
            | {side: [{"role": "assistant", "content": row[side]}] for side in sides}
            for row in ROWS
        ]
    trainer = sampling(tmp_path, tokenizer=tokenizer, eval_samples=2, eval_dataset=data)
    trainer.train()
    # As orpo-train does at the end: the same weights once more.
    trainer.evaluate()
    found = samples(tmp_path)
    assert [record["step"] for record in found] == [1, 1, 2, 2]
    prompts = [row["prompt"] for row in ROWS[:2]]
    # The training pairs are strings.
    expected = generate(trainer.model, tokenizer, prompts, max_new_tokens=8, chat_template=template is not None)
    assert [record["answer"] for record in found[2:]] == expected
    assert [record["chosen"].strip() for record in found[:2]] == SEVEN["chosen"][:2]
    assert all(prompt in record["prompt"] for prompt, record in zip(prompts, found[:2], strict=True))


def test_samples_change_nothing_in_training(tmp_path):
    plain = sampling(tmp_path / "a", generate_during_eval=False)
    plain.train()
    with_samples = sampling(tmp_path / "b")
    with_samples.train()
    assert logged(plain, "loss") == logged(with_samples, "loss")
    assert not (tmp_path / "a" / "samples.jsonl").exists()
    assert with_samples.model.training == plain.model.training


def test_a_resumed_run_keeps_the_samples_before_it_and_a_new_one_none(tmp_path):
    line = json.dumps({"step": 1}) + "\n" + json.dumps({"step": 5}) + "\n"
    (tmp_path / "samples.jsonl").write_text(line)
    callback = EvalSamples(sampling(tmp_path))
    args = make_args(tmp_path)
    callback.on_train_begin(args, SimpleNamespace(global_step=3, is_world_process_zero=True), None)
    assert [record["step"] for record in samples(tmp_path)] == [1]
    callback.on_train_begin(args, SimpleNamespace(global_step=0, is_world_process_zero=True), None)
    assert samples(tmp_path) == []


def test_several_held_out_sets_and_streams_are_sampled(tmp_path, own_cache):
    sets = {"a": SEVEN, "b": Dataset.from_dict(SEVEN).to_iterable_dataset()}
    trainer = sampling(tmp_path, eval_dataset=sets, eval_samples=1, max_steps=1)
    trainer.train()
    assert [record["dataset"] for record in samples(tmp_path)] == ["a", "b"]


def test_an_answer_ends_where_the_sequence_does(tmp_path):
    """OPT has no position behind its last: generating on would be an index out of range."""
    model = make_model("opt", max_position_embeddings=24, word_embed_proj_dim=32, ffn_dim=64)
    sampling(tmp_path, model=model, max_length=24, eval_max_new_tokens=200, max_steps=1).train()
    assert len(samples(tmp_path)) == 4


def test_where_nothing_can_be_sampled_it_is_said(tmp_path):
    with pytest.raises(ValueError, match="without eval_dataset"):
        sampling(tmp_path, eval_dataset=None, eval_strategy="no")
    for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        trainer = SimpleNamespace(**{"is_fsdp_enabled": False, "is_deepspeed_enabled": False, name: True})
        with pytest.raises(ValueError, match="FSDP and DeepSpeed cut up"):
            EvalSamples(trainer)
    with pytest.raises(ValueError, match="eval_samples is 0; it has to be at least 1"):
        make_args(tmp_path, eval_samples=0)


def test_a_run_stops_early_and_ends_with_its_best_weights(tmp_path):
    # The loss falls, and more is asked to be better: the first evaluation is the best, and two more end the run.
    settings = {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    trainer = make_trainer(
        tmp_path,
        eval_dataset=SEVEN,
        max_steps=6,
        early_stopping_patience=2,
        save_strategy="steps",
        save_steps=1,
        **EVERY_STEP,
        **settings,
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert trainer.state.global_step == len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert trainer.state.best_global_step == 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], abs=1e-6)
    trainer.create_model_card()
    assert "The weights are those of step 1, the best by `loss`" in (tmp_path / "README.md").read_text()


def test_an_improvement_below_the_threshold_does_not_count(tmp_path):
    settings = {"metric_for_best_model": "loss", "early_stopping_patience": 1, **EVERY_STEP}
    for threshold, steps in ((0.0, 4), (1e6, 2)):
        trainer = make_trainer(
            tmp_path, eval_dataset=SEVEN, max_steps=4, early_stopping_threshold=threshold, **settings
        )
        trainer.train()
        assert trainer.state.global_step == steps
        assert torch.isfinite(trainer.model.lm_head.weight).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_stopping_patience": 2}, "patience is 2 and eval_strategy 'no'"),
        ({"early_stopping_patience": 2, **EVERY_STEP}, "patience is 2, but nothing says by which metric"),
        ({"early_stopping_patience": 0, **EVERY_STEP}, "patience is 0; it has to be at least 1"),
        ({"early_stopping_threshold": -1.0}, "threshold is -1.0; it has to be at least 0"),
    ],
)
def test_early_stopping_that_could_not_work_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **settings)


def test_two_ranks_write_each_sample_once_and_neither_waits_for_ever(tmp_path):
    script = str(Path(__file__).parents[1] / "run_samples.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, str(tmp_path)]
    done = subprocess.run([sys.executable, *launcher], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("DistributedDataParallel") == 2
    assert [record["step"] for record in samples(tmp_path)] == [1, 1, 2, 2]


def test_a_run_resumes_over_lines_of_any_kind(tmp_path):
    """An answer may hold a line separator; a killed run may have written half a line."""
    trainer = sampling(tmp_path)
    path = tmp_path / "samples.jsonl"
    lines = [json.dumps({"step": step, "answer": f"a\u2028b{step}"}, ensure_ascii=False) for step in (1, 2, 3)]
    path.write_text("\n".join([*lines, '{"step": 2, "ans']), encoding="utf-8")
    state = SimpleNamespace(is_world_process_zero=True, global_step=2)
    EvalSamples(trainer).on_train_begin(trainer.args, state, None)
    assert path.read_text(encoding="utf-8") == "".join(f"{line}\n" for line in lines[:2])
    # Half a line may end in half a character.
    path.write_bytes(f'{lines[0]}\n{{"step": 2, "answer": "\u00fc'.encode()[:-1])
    EvalSamples(trainer).on_train_begin(trainer.args, state, None)
    assert path.read_text(encoding="utf-8") == f"{lines[0]}\n"


def test_a_prompt_beyond_the_models_positions_does_not_end_the_run(tmp_path):
    """Rotary models train past the positions that they name."""
    model = make_model("llama", max_position_embeddings=6)
    sampling(tmp_path, model=model, max_length=64, eval_samples=7, max_steps=1).train()
    lengths = [len(make_tokenizer()(r["prompt"], add_special_tokens=False)["input_ids"]) for r in samples(tmp_path)]
    assert 0 < len(lengths) < 7 and max(lengths) < 6
