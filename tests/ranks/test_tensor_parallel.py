"""orpo.trainer.tensor_parallel: a run whose matmuls are cut over ranks is that of one process."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from accelerate import ParallelismConfig
from packaging.version import Version
from run_forked import launch, returned
from run_tensor_parallel import command, resume, train
from tiny import ROWS, make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from orpo import ORPOConfig
from orpo.ranks import data_ranks

STRICT = {"rtol": 1e-5, "atol": 1e-6}
# With its usual epsilon the first steps go by the sign of a gradient, however small.
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-4}
# Of older ones the trainer refuses it.
NEEDS_5_24 = pytest.mark.skipif(Version(version("transformers")) < Version("5.24"), reason="needs transformers 5.24")
TWO = {"parallelism_config": ParallelismConfig(tp_size=2), "save_strategy": "no", "use_cpu": True}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a saved model, which is made when it is first asked for."""
    folders = {}

    def of(model_type="llama", **changes):
        key = (model_type, *changes.items())
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("model")
            make_model(model_type, **{"tie_word_embeddings": False, **changes}).save_pretrained(folders[key])
        return str(folders[key])

    return of


def assert_same_run(one, two, folder):
    logged = [(a, b) for a, b in zip(one["log"], two["log"], strict=True) if "loss" in a]
    assert len(logged) == 3
    for mine, other in [*logged, (one["eval"], two["eval"])]:
        for name, value in mine.items():
            if not name.endswith(("runtime", "per_second")):
                assert other[name] == pytest.approx(value, rel=1e-5, abs=2e-6), name
    torch.testing.assert_close(two["predictions"], one["predictions"], **STRICT)
    exported = AutoModelForCausalLM.from_pretrained(folder / "export").state_dict()
    assert two["weights"].keys() == one["weights"].keys() <= exported.keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, **STRICT)
        torch.testing.assert_close(exported[name], two["weights"][name], rtol=0, atol=0)


def pairs_of(seen):
    return [(step, ids) for step, ids, _ in seen["pair_ids"]]


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({}, {"accumulation": 3, "per_device_train_batch_size": 2, "layout": "padded", **ADAM}),
        ({"tie_word_embeddings": True, "vocab_size": 403}, {"accumulation": 2, "max_grad_norm": 0.01}),
    ],
    ids=["shared prompts", "padded, accumulation", "tied, a vocabulary that 2 does not divide"],
)
def test_two_ranks_equal_one_process(changes, options, tmp_path, folder_of):
    options = {"model": folder_of(**changes), **options}
    one = returned(train, 1, tmp_path / "one", options)[0]
    first, second = returned(train, 2, tmp_path / "two", {**options, "tp": 2})
    assert one["layout"] == first["layout"] and ("Padded" in one["layout"]) == ("layout" in options)
    rows = changes.get("vocab_size", 400)
    for seen, part in ((first, (rows + 1) // 2), (second, rows // 2)):
        # Never more of the head than this rank's own rows.
        assert seen["head"] == {(part, 32)} and one["head"] == {(rows, 32)}
        assert seen["pairs a step"] == one["pairs a step"] and pairs_of(seen) == pairs_of(one)
        assert_same_run(one, seen, tmp_path / "two")
    for name, weight in first["weights"].items():
        torch.testing.assert_close(second["weights"][name], weight, rtol=0, atol=0)


def test_norms_of_single_heads_equal_one_process(tmp_path, folder_of):
    """Qwen3's q_norm and k_norm see the heads of their rank alone."""
    options = {"model": folder_of("qwen3", head_dim=8)}
    one = returned(train, 1, tmp_path / "one", options)[0]
    for seen in returned(train, 2, tmp_path / "two", {**options, "tp": 2}):
        assert_same_run(one, seen, tmp_path / "two")


@NEEDS_5_24
@pytest.mark.parametrize(
    ("rows", "options"),
    [(400, {}), (403, {"accumulation": 2, "layout": "padded", **ADAM})],
    ids=["", "accumulation, a vocabulary that 2 does not divide"],
)
def test_fsdp2_over_two_equals_one_process(rows, options, tmp_path, folder_of):
    options = {"model": folder_of(vocab_size=rows), **options}
    steps = options.pop("accumulation", 1)
    one = returned(train, 1, tmp_path / "one", {**options, "accumulation": 2 * steps})[0]
    cut = {**options, "accumulation": steps, "tp": 2, "shards": 2}
    ends = launch(train, 4, tmp_path / "four", cut, limit=240)
    assert not any(error for *_, error in ends), ends[0][-1]
    several = [value for _, value, *_ in ends]
    for rank, seen in enumerate(several):
        assert seen["sharded"] >= 3 and seen["head"] == {((rows + 1 - rank % 2) // 2, 32)}
        assert seen["pairs a step"] == one["pairs a step"]
        assert_same_run(one, seen, tmp_path / "four")
    # Ranks 0 and 1 share matmuls, and so do 2 and 3; together the two groups have each pair once.
    assert pairs_of(several[0]) == pairs_of(several[1]) != pairs_of(several[2]) == pairs_of(several[3])
    for step in range(3):
        mine, other = ([i for at, ids in pairs_of(seen) if at == step for i in ids] for seen in several[::2])
        assert sorted(mine + other) == sorted(i for at, ids in pairs_of(one) if at == step for i in ids)
    told = "4 ranks (cpu), FSDP2 over 2 x tensor parallel over 2: each holds 1/4 of the matmuls' weights\n"
    assert [printed.count(told) for *_, printed, _ in ends] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_strategy": "steps"}, "and save_strategy 'steps': the parts of an optimizer are not saved"),
        ({"load_best_model_at_end": True}, "and load_best_model_at_end is set"),
        ({"diagnose": True}, "and diagnose is set"),
        ({"generate_during_eval": True}, "and generate_during_eval is set"),
        ({"fp16": True}, "and fp16 is set"),
        ({"deepspeed": "zero.json"}, "and deepspeed is set"),
        ({"fsdp": True}, "and fsdp is set: FSDP2 comes with the load here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_such_a_run_cannot_have_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"tp_size is 2, {message}"):
        ORPOConfig(**{**TWO, **settings})


@pytest.mark.parametrize(("variable", "name"), [("FSDP", "fsdp"), ("DEEPSPEED", "deepspeed")])
def test_what_a_launcher_asks_for_is_refused_too(variable, name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(ValueError, match=f"tp_size is 2, and {name} is set"):
        ORPOConfig(**TWO)


def test_copies_of_a_model_that_is_cut_are_refused():
    copies = ParallelismConfig(tp_size=2, dp_replicate_size=2, dp_shard_size=2)
    with pytest.raises(ValueError, match="tp_size is 2 and dp_replicate_size 2"):
        ORPOConfig(**{**TWO, "parallelism_config": copies})


def test_fsdp2_beside_it_is_refused_with_older_transformers(monkeypatch):
    monkeypatch.setattr("orpo.trainer.tensor_parallel.version", lambda package: "5.23.1")
    with pytest.raises(ValueError, match=r"tp_size is 2 and dp_shard_size 2, and with transformers 5\.23\.1"):
        ORPOConfig(**{**TWO, "parallelism_config": ParallelismConfig(tp_size=2, dp_shard_size=2)})


@pytest.mark.parametrize(
    ("ranks", "model", "options", "message"),
    [
        (2, None, {}, "the model given is cut in 1: give its name or folder"),
        (2, ("llama", {}), {"lora": {"target_modules": ["q_proj"]}}, "and peft_config is given"),
        (2, ("llama", {"num_key_value_heads": 1}), {}, "which does not divide the 1 num_key_value_heads"),
        (2, ("llama", {}), {"stream": True}, "and a data set is a stream"),
        (2, ("llama", {}), {"tp": 4}, "tp_size 4 x dp_shard_size 1 is 4, and there are 2 ranks"),
        (2, ("qwen3", {"head_dim": 8}), {"accumulation": 2}, "wrongly with gradient_accumulation_steps 2"),
        pytest.param(
            *(4, ("llama", {"tie_word_embeddings": True}), {"shards": 2}, "the head is tied to the embeddings"),
            marks=NEEDS_5_24,
        ),
    ],
    ids=["a loaded model", "an adapter", "one head", "a stream", "ranks", "summed gradients", "a tied head cut twice"],
)
def test_what_only_the_model_and_data_show_is_refused(ranks, model, options, message, tmp_path, folder_of):
    options = {"model": folder_of(model[0], **model[1]) if model else {}, "tp": 2, **options}
    ends = launch(train, ranks, tmp_path / "out", options)
    assert all("ValueError: parallelism_config: tp_size" in error and message in error for *_, error in ends), ends[0]


def test_a_checkpoint_is_refused(tmp_path, folder_of):
    """One that a run under DDP, of as many ranks, has left in output_dir."""
    options = {"model": folder_of(), "max_steps": 2}
    returned(train, 2, tmp_path / "out", {**options, "save_strategy": "steps", "save_steps": 1})
    ends = launch(resume, 2, tmp_path / "out", {**options, "tp": 2})
    assert all("is a checkpoint, from which such a run does not go on" in error for *_, error in ends), ends[0]


def test_the_command_in_bfloat16(tmp_path, folder_of):
    model, pairs = Path(folder_of()), tmp_path / "pairs.jsonl"
    make_tokenizer().save_pretrained(model)
    pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    line = ["--model_name_or_path", str(model), "--dataset_name", str(pairs), "--eval_dataset_name", str(pairs)]
    line += ["--bf16", "true", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    ends = launch(command, 2, tmp_path / "out", [*line, "--max_steps", "2"])
    assert not any(error for *_, error in ends), ends[0][-1]
    said = ends[0][2]
    assert said.count("2 ranks (cpu), tensor parallel: each holds 1/2 of the matmuls' weights\n") == 1
    # Batch x accumulation, of both ranks together.
    assert "2 steps of 4 pairs" in said
    assert "4 pairs an optimizer step on 2 processes" in (tmp_path / "out/run/README.md").read_text()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out/run").state_dict()
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for name, weight in before.items():
        assert trained[name].shape == weight.shape and not torch.equal(trained[name], weight), name


def test_the_command_does_not_check_such_ranks(tmp_path, folder_of):
    model, pairs = Path(folder_of()), tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    line = ["--model_name_or_path", str(model), "--dataset_name", str(pairs), "--check_ranks"]
    ends = launch(command, 2, tmp_path / "out", line)
    assert all("tp_size is 2, and --check_ranks compares" in error for *_, error in ends), ends[0]


def test_pairs_count_by_ranks_that_read_rows_of_their_own():
    assert data_ranks(None, 4) == data_ranks(ParallelismConfig(dp_shard_size=4), 4) == 4
    assert data_ranks(ParallelismConfig(tp_size=2, dp_shard_size=2), 4) == 2
