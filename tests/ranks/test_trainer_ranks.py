"""orpo.trainer.trainer on several ranks: the same losses, metrics and weights as on one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.utils import merge_fsdp_weights
from run_forked import launch, returned
from run_ranks import EIGHT, train, train_to_the_best, train_with_another_head, warnings_on_own_disks
from safetensors.torch import load_file
from tiny import SEVEN, make_model, make_tokenizer, reference_loss
from transformers import AutoModelForCausalLM

from orpo.data.prepare import Limits, prepare_dataset
from orpo.model.load import load_model

SCRIPT = Path(__file__).parents[1] / "run_ranks.py"
TIED = {"model": {"tie_word_embeddings": True}}
LORA = {
    "frozen head": {"target_modules": ["q_proj", "v_proj"]},
    "head whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head by LoRA": {"target_modules": ["q_proj", "lm_head"]},
}


def torchrun(folder, *arguments):
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launcher, str(SCRIPT), str(folder), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A run in one process, made when it is first asked for."""
    runs = {}

    def of(name, options):
        if name not in runs:
            runs[name] = returned(train, 1, tmp_path_factory.mktemp("one"), options)[0]
        return runs[name]

    return of


@pytest.mark.parametrize("wrapper", [(), ("fsdp",)], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("death", ["exit", "raise"])
def test_one_rank_dying_ends_the_run(death, wrapper, tmp_path):
    start = time.monotonic()
    done = torchrun(tmp_path / "out", death, *wrapper)
    # The other rank waits for the dead one in a reduction that never ends; it has to be taken down.
    assert done.returncode != 0 and time.monotonic() - start < 150
    assert ("the last rank has had enough" if death == "raise" else "exitcode  : 9") in done.stderr
    assert not (tmp_path / "out" / "seen.json").exists()


def test_a_launcher_starts_two_ranks(tmp_path, one_process):
    """Answers of unequal length, an accumulation window of four or two micro-batches, and an odd evaluation set."""
    done = torchrun(tmp_path / "out", "none")
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "out" / "seen.json").read_text())
    one = one_process("untied", {})
    assert (one["wrapper"], seen["wrapper"]) == ("LlamaForCausalLM", "DistributedDataParallel")
    assert_same_run(one, {**seen, "weights": torch.load(tmp_path / "out" / "weights.pt")})
    assert done.stdout.count("train: kept 8 of 8") == 1
    assert done.stdout.count("2 ranks (cpu), DDP: each holds the whole model\n") == 1


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("wrapper", [{}, {"fsdp": True}], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("head", [{}, TIED], ids=["untied", "tied"])
def test_several_ranks_equal_one(head, wrapper, ranks, tmp_path, one_process):
    several = returned(train, ranks, tmp_path / "several", {**head, **wrapper})
    for seen in several:
        # accelerate falls back to DDP in silence: both layers and the root have to be sharded.
        assert seen["sharded"] >= 3 if wrapper else seen["wrapper"] == "DistributedDataParallel"
        assert_same_run(one_process("tied" if head else "untied", head), seen)


def test_two_copies_of_a_model_cut_in_two_equal_one_process(tmp_path, one_process):
    options = {"fsdp": True, "parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)}
    ends = launch(train, 4, tmp_path / "four", options)
    assert not any(error for *_, error in ends), ends[0][-1]
    for _, seen, *_ in ends:
        assert seen["sharded"] >= 3
        assert_same_run(one_process("untied", {}), seen)
    said = "4 ranks (cpu), HSDP, 2 copies: each holds 1/2 of weights, gradients and optimizer states\n"
    assert said in ends[0][2] and not any("4 ranks" in printed for _, _, printed, _ in ends[1:])


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_an_encoder_decoder_on_two_ranks_equals_one(model_type, tmp_path, one_process):
    options = {"model": {"model_type": model_type, "tie_word_embeddings": True}}
    one, two = one_process(model_type, options), returned(train, 2, tmp_path / "two", options)[0]
    assert two["wrapper"] == "DistributedDataParallel"
    assert_same_run(one, two)
    # One weight of embeddings, head, encoder and decoder, in the group of the whole model.
    two = returned(train, 2, tmp_path / "fsdp", {**options, "fsdp": True})[0]
    assert two["sharded"] >= 5
    assert_same_run(one, two)


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_an_encoder_decoder_whose_weights_rank_0_alone_has(model_type, tmp_path, one_process):
    options = {"model": {"model_type": model_type, "tie_word_embeddings": True}}
    ends = launch(train, 2, tmp_path / "two", {**options, "fsdp": {"cpu_ram_efficient_loading": True}})
    if model_type == "t5":
        assert_same_run(one_process(model_type, options), ends[0][1])
    else:
        # BART's final_logits_bias is a buffer.
        assert all("the model keeps final_logits_bias beside them: set it false" in error for *_, error in ends), ends


def test_router_losses_of_two_ranks_are_means(tmp_path):
    experts = {"model_type": "mixtral", "num_local_experts": 4, "output_router_logits": True}
    options = {"model": {**experts, "router_aux_loss_coef": 0.5}, "max_steps": 2}
    one, two = (returned(train, ranks, tmp_path / str(ranks), options)[0] for ranks in (1, 2))
    # Both had the same pairs as micro-batches of one.
    for a, b in zip(one["log"], two["log"], strict=True):
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert a["loss"] - a["nll_loss"] + 0.1 * a["log_odds_ratio"] > 0.5
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrapper", [{}, {"fsdp": True}], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("way", LORA)
def test_lora_on_two_ranks_equals_one(way, wrapper, tmp_path, one_process):
    options = {"lora": LORA[way]}
    one, two = one_process(way, options), returned(train, 2, tmp_path / "two", {**options, **wrapper})[0]
    assert (two["sharded"] >= 3) == bool(wrapper)
    assert_same_run(one, two)
    start = returned(train, 1, tmp_path / "start", {**options, "max_steps": 1, "learning_rate": 0.0})[0]
    moved = {name for name, weight in one["weights"].items() if not torch.equal(weight, start["weights"][name])}
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)
    assert any("lm_head" in name for name in moved) == (way != "frozen head")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp": True, "lora": LORA["head whole"], **TIED}, "copies a head that is tied to the embeddings"),
        (
            {"fsdp": {"cpu_ram_efficient_loading": True}, "lora": LORA["head by LoRA"], **TIED},
            "fsdp_cpu_ram_efficient_loading ties the head to the embeddings once more",
        ),
        ({"accelerator_config": {"even_batches": False}}, "even_batches is False, and 2 ranks may have different"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches is True, which cuts a batch"),
    ],
    ids=["tied head whole", "tied head by LoRA", "uneven batches", "dispatched batches"],
)
def test_what_cannot_run_is_refused_before_work(options, message, tmp_path):
    ends = launch(train, 2, tmp_path / "out", options)
    assert all("ValueError: " in error and message in error for *_, error in ends), ends[0][-1]


@pytest.mark.parametrize("adapter", [None, LORA["frozen head"]], ids=["", "lora"])
def test_rank_0_alone_needs_the_weights(adapter, tmp_path, one_process):
    """With cpu_ram_efficient_loading what the other ranks hold before the model is cut plays no role."""
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "lora": adapter}
    one = one_process(f"loaded, {adapter}", options)
    sparing = {"fsdp": {"cpu_ram_efficient_loading": True}, "forget": True}
    for seen in returned(train, 2, tmp_path / "two", {**options, **sparing}):
        assert seen["sharded"] >= 3
        assert_same_run(one, seen)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"train": SEVEN, "per_device_train_batch_size": 2}),
        (4, {"train": SEVEN, "pairs_per_step": 8, "fsdp": True}),
        (2, {"pairs_per_step": 2, "empty": (1, 2, 3, 4, 5)}),
        (2, {"pairs_per_step": 2, "empty": (1, 2, 3, 4, 5), "fsdp": True}),
    ],
    ids=["ddp, 7 pairs", "fsdp2, 7 pairs", "ddp, nothing counts on a rank", "fsdp2, nothing counts on a rank"],
)
def test_uneven_steps_are_means_over_what_counts(ranks, options, tmp_path):
    """Replayed one sequence at a time: every pair that a rank had, those that fill the last batch again included."""
    first = {name: column[:1] for name, column in EIGHT.items()}
    plain = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "max_steps": 4, "evaluate": first}
    several = returned(
        train, ranks, tmp_path / "several", {**options, **plain, "evaluate": {k: v[:1] for k, v in EIGHT.items()}}
    )
    examples = prepare_dataset(
        options.get("train", EIGHT), make_tokenizer(), Limits(max_length=256), name="train"
    ).to_list()
    model, empty, held = make_model("llama", tie_word_embeddings=False), options.get("empty", ()), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(4):
        ids = [
            [i for at, part, _ in seen["pair_ids"] if at == step for i in part if i not in empty] for seen in several
        ]
        held.append([len(part) for part in ids])
        expected = 0.0
        if any(ids):
            loss = reference_loss(model, [examples[i] for part in ids for i in part])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            expected = loss.item()
        assert [e["loss"] for e in several[0]["log"] if "loss" in e][step] == pytest.approx(expected, rel=1e-5)
    if empty:
        assert any(0 in step and sum(step) for step in held), held
    for seen in several:
        assert (seen["sharded"] >= 3) == ("fsdp" in options)
        # One pair for all ranks: the others have it again, and it counts once.
        assert seen["eval"]["eval_loss"] == pytest.approx(reference_loss(model, examples[:1]).item(), rel=1e-5)
        for name, weight in model.named_parameters():
            torch.testing.assert_close(seen["weights"][name], weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrapper", [{}, {"fsdp": {"state_dict_type": "SHARDED_STATE_DICT"}}], ids=["ddp", "sharded"])
def test_every_rank_loads_the_best_checkpoint(wrapper, tmp_path):
    """The first of four evaluations, called the best: no rank may go on with the last step's part of a weight."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    often = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3, "max_steps": 12}
    several = returned(train_to_the_best, 2, tmp_path / "out", {**wrapper, **best, **often, "learning_rate": 0.3})
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out/export").state_dict()
    for seen in several:
        losses = [entry["eval_loss"] for entry in seen["log"] if "eval_loss" in entry]
        assert seen["best"] == str(tmp_path / "out/out/checkpoint-3") and losses[0] > losses[3] + 0.1
        assert seen["eval"]["eval_loss"] == losses[0]
        for name, weight in seen["weights"].items():
            torch.testing.assert_close(exported[name], weight, rtol=0, atol=0)
    shards = tmp_path / "out/out/checkpoint-3/pytorch_model_fsdp_0"
    assert shards.is_dir() == bool(wrapper)
    if wrapper:
        with pytest.raises(ValueError, match=f"accelerate merge-weights {shards} FOLDER puts the weights together"):
            load_model(str(shards.parent))
        merge_fsdp_weights(str(shards), str(tmp_path / "merged"))
        torch.testing.assert_close(load_file(tmp_path / "merged/model.safetensors"), exported, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"save_on_each_node": True}], ids=["", "saved on each node"])
def test_ranks_with_disks_of_their_own_are_told_before_the_first_step(options, tmp_path):
    first, second = returned(warnings_on_own_disks, 2, tmp_path / "out", {"max_steps": 1, **options})
    told = [text for text in first if text.startswith("1 of 2 ranks have another output_dir")]
    assert len(told) == (not options) and not any("another output_dir" in text for text in second)


def test_an_error_before_training_is_every_ranks(tmp_path):
    """Rank 0 alone looks at the model; the others must not wait for it."""
    ends = launch(train_with_another_head, 2, tmp_path / "out")
    assert all("ValueError: the fused log-probabilities" in error for *_, error in ends), ends


def assert_same_run(one, two):
    compared = [(a, b) for a, b in zip(one["log"], two["log"], strict=True) if "loss" in a]
    assert len(compared) == 3
    for mine, other in [*compared, (one["eval"], two["eval"])]:
        for name, value in mine.items():
            if name.startswith("eval_") and name.endswith(("runtime", "per_second")):
                continue
            assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert two["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-5, atol=1e-6)
