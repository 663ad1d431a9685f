"""A resumed run has the rows and losses of one that was never interrupted, and a finished run ends."""

import json
import shutil

import datasets
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from tiny import SEVEN, make_model
from trainers import logged, make_trainer
from transformers import TrainerCallback

from orpo.data import prepare

# Eleven pairs of eleven lengths: six batches of two an epoch, the last of one, so that one step of each accumulation
# is cut short.
ELEVEN = {
    "prompt": [f"{'how are you ' * (i * 5 % 11)}hello" for i in range(11)],
    "chosen": [f"I am fine {'and well ' * (i % 3)}{i}" for i in range(11)],
    "rejected": [f"leave me alone {i}" for i in range(11)],
}
# Eleven pairs again, made of four rows.
FOUR_ROWS = {
    "prompt": ELEVEN["prompt"][:4],
    "chosen": ELEVEN["chosen"][:4],
    "rejected": [[f"leave me alone {3 * i + j}" for j in range(3 if i else 2)] for i in range(4)],
}
STRATEGIES = ("random", "sequential", "group_by_length", "batch_rebalance", "stream", "rows")
STEPS_AN_EPOCH = {1: 6, 2: 3, 4: 2}


class SaveAt(TrainerCallback):
    """Saves after the given steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        control.should_save = state.global_step in self.steps


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


def watched(folder, strategy, accumulation, **settings):
    """(trainer, the rows of each of its steps)"""
    data = ELEVEN
    if strategy == "stream":
        # Shuffled anew for each pass.
        data = datasets.Dataset.from_dict(ELEVEN).to_iterable_dataset(num_shards=2).shuffle(seed=5, buffer_size=4)
    elif strategy == "rows":
        data = FOUR_ROWS
    trainer = make_trainer(
        folder,
        # Attention dropout draws from the random state that an order must not depend on.
        make_model("llama", num_hidden_layers=1, attention_dropout=0.2),
        data,
        gradient_checkpointing=False,
        disable_dropout=False,
        layout="shared" if strategy == "rows" else "padded",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="random" if strategy in ("stream", "rows") else strategy,
        **{"max_steps": 3 * STEPS_AN_EPOCH[accumulation], **settings},
    )
    steps, run = {}, trainer._run

    def noted(model, inputs, *arguments, **options):
        if model.training:
            steps.setdefault(trainer.state.global_step + 1, []).append(inputs["orpo"].pair_ids.tolist())
        return run(model, inputs, *arguments, **options)

    trainer._run = noted
    return trainer, steps


@pytest.mark.parametrize("accumulation", STEPS_AN_EPOCH)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_has_the_rows_and_losses_of_a_whole_one(strategy, accumulation, tmp_path):
    """Resumed at the first, the middle and the last step of the second epoch."""
    whole, rows = watched(tmp_path / "whole", strategy, accumulation)
    # What is left of a stream that does not fill a step is dropped.
    epoch = 6 // accumulation if strategy == "stream" else STEPS_AN_EPOCH[accumulation]
    saved = sorted({epoch + 1, epoch + (epoch + 1) // 2, 2 * epoch})
    whole.add_callback(SaveAt(saved))
    whole.add_callback(StopAt(2 * epoch + 1))
    whole.train()
    losses = logged(whole, "loss")
    assert len(losses) == 2 * epoch + 1
    for step in saved:
        resumed, seen = watched(tmp_path / "resumed", strategy, accumulation)
        resumed.add_callback(StopAt(end := min(step + 2, 2 * epoch + 1)))
        resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        assert seen == {i: rows[i] for i in range(step + 1, end + 1)}, f"resumed at {step}"
        assert logged(resumed, "loss") == losses[:end]


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance", "rows"])
def test_two_ranks_share_the_rows_of_an_epoch_after_a_checkpoint_too(strategy, tmp_path, monkeypatch):
    settings = {"layout": "shared"} if strategy == "rows" else {"train_sampling_strategy": strategy}
    trainer = make_trainer(tmp_path, train_dataset=FOUR_ROWS if strategy == "rows" else ELEVEN, **settings)
    parts = []
    for rank in range(2):
        options = {"num_processes": 2, "process_index": rank, "put_on_device": False}
        monkeypatch.setattr(trainer.accelerator, "prepare", lambda loader, o=options: prepare_data_loader(loader, **o))
        monkeypatch.setattr(type(trainer.args), "world_size", 2)
        monkeypatch.setattr(type(trainer.args), "process_index", rank)
        # Ranks draw different numbers in training.
        torch.manual_seed(rank)
        loader = trainer.get_train_dataloader()
        epochs = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            epochs.append([batch["orpo"].pair_ids.tolist() for batch in loader])
        resumed = skip_first_batches(trainer.get_train_dataloader(), 1)
        resumed.set_epoch(1)
        assert [batch["orpo"].pair_ids.tolist() for batch in resumed] == epochs[1][1:]
        assert epochs[0] != epochs[1]
        parts.append(epochs[1])
    assert {i for part in parts for batch in part for i in batch} == set(trainer.train_dataset["pair_id"])


@pytest.mark.parametrize("seed", [None, 5])
def test_pairs_of_a_row_come_one_after_the_other_where_they_share_their_prompt(seed, tmp_path):
    trainer = make_trainer(tmp_path, train_dataset=FOUR_ROWS, layout="shared", data_seed=seed)
    sampler = trainer._get_train_sampler()
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] != orders[1] and len(sampler) == 11
    rows = [[0, 1], [2, 3, 4], [5, 6, 7], [8, 9, 10]]
    for order in orders:
        in_order = sorted(rows, key=lambda row, order=order: order.index(row[0]))
        assert order == [pair for row in in_order for pair in row]
    assert trainer.data_collator([trainer.train_dataset[i] for i in rows[1]])["input_ids"].shape[0] == 1


def test_other_data_and_layouts_keep_the_order_that_they_had(tmp_path):
    for data, layout in ((ELEVEN, "shared"), (FOUR_ROWS, "padded")):
        trainer = make_trainer(tmp_path, train_dataset=data, layout=layout)
        assert type(trainer._get_train_sampler()) is torch.utils.data.RandomSampler


def test_an_order_that_nothing_remembers_is_refused_where_a_run_resumes(tmp_path):
    unseeded = {"accelerator_config": {"use_seedable_sampler": False}, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, max_steps=1, **unseeded).train()
    with pytest.raises(ValueError, match="use_seedable_sampler is False"):
        make_trainer(tmp_path, max_steps=2, **unseeded).train("auto")
    trainer = make_trainer(tmp_path, max_steps=2, **{**unseeded, "accelerator_config": {}})
    trainer.train("auto")
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
def test_a_finished_run_that_is_started_again_trains_nothing(stream, tmp_path, capsys):
    """Five of the six steps of an epoch."""
    settings = {"max_steps": 5, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 5}
    runs = []
    for _ in range(2):
        data = datasets.Dataset.from_dict(ELEVEN).to_iterable_dataset() if stream else ELEVEN
        runs.append(make_trainer(tmp_path, train_dataset=data, **settings))
        output = runs[-1].train(resume_from_checkpoint="auto")
    assert "the run is finished, step 5 of 5: nothing is trained" in capsys.readouterr().out
    assert runs[1].state.global_step == 5 and "train_loss" not in output.metrics
    assert (
        runs[1].state.log_history
        == json.loads((tmp_path / "checkpoint-5/trainer_state.json").read_text())["log_history"]
    )
    for name, weight in runs[0].model.state_dict().items():
        assert torch.equal(weight, runs[1].model.state_dict()[name]), name
    longer = make_trainer(tmp_path, train_dataset=data, **{**settings, "max_steps": 7})
    longer.train("auto")
    assert [e["step"] for e in longer.state.log_history if "loss" in e] == [*range(1, 8)]


def test_early_stopping_counts_on_after_a_checkpoint_and_has_stopped_for_good(tmp_path, capsys):
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    settings = {**every, "max_steps": 6, "metric_for_best_model": "loss", "early_stopping_threshold": 100.0}

    def run(patience, resume):
        # Nothing improves by as much as the threshold but the first evaluation.
        trainer = make_trainer(tmp_path, eval_dataset=SEVEN, early_stopping_patience=patience, **settings)
        trainer.train(resume)
        return trainer.state.global_step

    assert run(2, None) == 3
    assert run(2, "auto") == 3
    assert "stopped early at step 3 with early_stopping_patience 2: nothing is trained" in capsys.readouterr().out
    assert run(2, str(tmp_path / "checkpoint-2")) == 3
    assert run(3, "auto") == 4


def test_the_best_adapter_is_loaded_back_under_any_name(tmp_path):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(make_model(), config, adapter_name="mine")
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "loss"}
    trainer = make_trainer(tmp_path, model, eval_dataset=SEVEN, max_steps=3, learning_rate=0.1, **every, **best)
    trainer.train()
    # The loss falls, and more is said to be better.
    assert trainer.state.best_global_step == 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


@pytest.mark.parametrize("asked", ["moved", "by other paths"])
def test_the_best_checkpoint_is_found_where_the_folder_lies_now(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "loss"}
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    # The held-out loss falls, and the highest is asked for: that of the first step.
    settings = {**every, **best, "eval_dataset": SEVEN, "save_total_limit": 2, "learning_rate": 0.01}
    make_trainer("out", max_steps=2, **settings).train()
    if asked == "moved":
        (tmp_path / "out").rename("moved")
        folder, wanted = "moved", "auto"
    else:
        folder, wanted = str(tmp_path / "out"), "out/checkpoint-2"
    trainer = make_trainer(folder, max_steps=4, **settings)
    trainer.train(wanted)
    assert trainer.state.best_global_step == 1
    assert sorted(path.name for path in (tmp_path / folder).glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_a_finished_run_whose_best_step_is_not_its_last_trains_nothing(tmp_path, capsys):
    best = {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "loss"}
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings = {**every, **best, "eval_dataset": SEVEN, "save_total_limit": 1, "learning_rate": 0.01, "max_steps": 3}
    first = make_trainer(tmp_path, **settings)
    first.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    again = make_trainer(tmp_path, **settings)
    again.train("auto")
    assert "the run is finished, step 3 of 3: nothing is trained" in capsys.readouterr().out
    assert all(map(torch.equal, first.model.state_dict().values(), again.model.state_dict().values()))


def test_the_best_checkpoint_of_a_folder_spelled_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "loss"}
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer("./out", **every, **best, eval_dataset=SEVEN, learning_rate=0.01, max_steps=2)
    trainer.train()
    assert trainer.state.best_model_checkpoint == "out/checkpoint-1"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


@pytest.mark.parametrize("harm", ["changed", "removed"])
def test_a_best_checkpoint_that_was_harmed_is_not_loaded(harm, tmp_path, capsys):
    best = {"load_best_model_at_end": True, "greater_is_better": True, "metric_for_best_model": "loss"}
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "layout": "padded"}
    # The loss falls, and the highest is asked for.
    settings = {**every, **best, "eval_dataset": SEVEN, "save_total_limit": 2, "learning_rate": 0.01}
    make_trainer(tmp_path, max_steps=2, **settings).train()
    trainer = make_trainer(tmp_path, max_steps=4, **settings)
    if harm == "changed":
        weights = tmp_path / "checkpoint-1/model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
        with pytest.raises(
            ValueError, match=r"the best checkpoint, has a model.safetensors whose checksum .*: load_best_model_at_end"
        ):
            trainer.train("auto")
        return
    shutil.rmtree(tmp_path / "checkpoint-1")
    trainer.train("auto")
    assert "checkpoint-1, the best checkpoint so far, is gone" in capsys.readouterr().out
    assert trainer.state.best_global_step == 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_logs_evaluations_and_saves_are_as_often_as_the_resumed_run_is_told(tmp_path):
    often = {"eval_strategy": "steps", "save_strategy": "steps", "layout": "padded"}
    for every, steps in ((2, 2), (1, 4)):
        times = {"logging_steps": every, "eval_steps": every, "save_steps": every}
        trainer = make_trainer(tmp_path, eval_dataset=SEVEN, max_steps=steps, **often, **times)
        trainer.train("auto")
    for name in ("loss", "eval_loss"):
        assert [e["step"] for e in trainer.state.log_history if name in e] == [2, 3, 4]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 3, 4)]


def test_a_stream_is_not_read_again_before_the_place_of_the_checkpoint(tmp_path, monkeypatch):
    """Four shards of eleven rows; resumed in the third, of the second pass."""
    monkeypatch.setattr(prepare, "ROWS_OF_A_STREAM", 4)
    reads = []

    def rows(shards):
        for shard in shards:
            for i in range(11):
                reads.append((shard, i))
                yield {name: f"{column[i]} {shard}" for name, column in ELEVEN.items()}

    def run(folder, **settings):
        stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [*range(4)]})
        trainer = make_trainer(
            folder,
            make_model("llama", num_hidden_layers=1, attention_dropout=0.2),
            stream,
            # Made of the same rows, and read in between.
            eval_dataset=stream.take(3),
            eval_strategy="steps",
            eval_steps=3,
            disable_dropout=False,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=22,
            **settings,
        )
        trainer.add_callback(SaveAt([18]))
        return trainer

    whole = run(tmp_path / "whole")
    whole.train()
    place = json.loads((tmp_path / "whole/checkpoint-18/stream_place.json").read_text())
    assert place["epoch"] == 1
    resumed = run(tmp_path / "resumed")
    reads.clear()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-18"))
    assert logged(resumed, "loss") == logged(whole, "loss") and logged(resumed, "eval_loss") == logged(
        whole, "eval_loss"
    )
    # Step 18 ends 28 pairs into the pass; evaluations read the first rows of the first shard.
    assert {shard for shard, _ in reads} == {0, 2, 3} and (0, 4) not in reads


def test_a_checkpoint_without_the_place_goes_on_with_the_same_rows(tmp_path):
    """As an earlier version saved it, or of a stream whose shuffle buffer would be lost: the stream is read again."""
    whole, rows = watched(tmp_path / "whole", "stream", 1)
    whole.add_callback(SaveAt([8]))
    whole.train()
    assert not (tmp_path / "whole/checkpoint-8/stream_place.json").exists()
    resumed, seen = watched(tmp_path / "resumed", "stream", 1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-8"))
    assert seen == {i: rows[i] for i in range(9, 19)}
