"""A run that starts from an adapter, by name; resumed, saved and generated from."""

import json
import os
import shutil
from contextlib import contextmanager

import peft
import pytest
import torch
from huggingface_hub import constants
from tiny import CHATML, ROWS, SEVEN, make_model, make_tokenizer
from trainers import make_args
from transformers import AutoModelForCausalLM

from orpo import ORPOTrainer, train
from orpo.cli.arguments import parse
from orpo.cli.run import train as run_train
from orpo.generation import load
from orpo.merge import merge_adapter
from orpo.model.load import load_tokenizer
from orpo.trainer.start import load_start

IDS = torch.arange(3, 60)[None]
pytestmark = pytest.mark.usefixtures("own_cache")


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def adapter(tmp_path):
    """The folder of an adapter as fine-tuning leaves it: without a tokenizer of its own."""
    make_model("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) * parameter.requires_grad)
    model.save_pretrained(tmp_path / "sft")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path / "sft"


def adapted(folder):
    return peft.AutoPeftModelForCausalLM.from_pretrained(folder)


def line(adapter, output, *more):
    options = f"--model_name_or_path {adapter} --dataset_name {adapter.parent / 'pairs.jsonl'} --output_dir {output}"
    return parse([*f"{options} --max_steps 2 --learning_rate 1e-2 --use_cpu --report_to none".split(), *more])


def test_an_adapter_by_name_is_trained_further(adapter, tmp_path, capsys):
    trainer = run_train(*line(adapter, tmp_path / "out"))
    assert f"{adapter} is an adapter on {tmp_path / 'base'}: it is trained further" in capsys.readouterr().out
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert trainer.model.peft_config["default"].r == 4
    saved, _ = load(str(tmp_path / "out"), device="cpu")
    assert torch.equal(logits(saved), logits(trainer.model))
    assert (logits(saved) - logits(adapted(adapter))).abs().max() > 1e-2
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(trainer.model.unload()), logits(base))


def test_a_trainer_starts_from_what_the_adapter_computes(adapter, tmp_path):
    for config in (None, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")):
        trainer = ORPOTrainer(str(adapter), make_args(tmp_path / "out"), train_dataset=SEVEN, peft_config=config)
        assert torch.allclose(logits(trainer.model), logits(adapted(adapter)), atol=1e-5)
        assert trainer.model.peft_config["default"].r == (4 if config is None else 2)


def test_a_new_adapter_is_trained_on_the_merged_one_and_found_again(adapter, tmp_path, capsys):
    trainer = run_train(*line(adapter, tmp_path / "out", "--use_peft", "--merge_adapter"))
    merged = tmp_path / "out" / "base"
    assert f"it is merged, in {merged}, and the new adapter is trained on that" in capsys.readouterr().out
    assert trainer.model.peft_config["default"].base_model_name_or_path == str(merged)
    expected = logits(trainer.model)
    for folder in (tmp_path / "out", tmp_path / "out" / "merged"):
        assert torch.allclose(logits(load(str(folder), device="cpu")[0]), expected, atol=1e-5)
    before = (merged / "model.safetensors").stat().st_mtime_ns
    run_train(*line(adapter, tmp_path / "out", "--use_peft", "--max_steps", "3"))
    assert (merged / "model.safetensors").stat().st_mtime_ns == before
    # Another adapter of that name is merged anew.
    shutil.copy(tmp_path / "out" / "adapter_config.json", adapter / "adapter_config.json")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "out" / name, adapter / name)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "base")})
    )
    run_train(*line(adapter, tmp_path / "out", "--use_peft", "--resume_from_checkpoint", "false"))
    assert (merged / "model.safetensors").stat().st_mtime_ns != before


@pytest.mark.parametrize("more", [[], ["--use_peft"]], ids=["further", "merged first"])
def test_a_run_from_an_adapter_resumes(more, adapter, tmp_path):
    saving = [*more, "--save_steps", "1", "--lr_scheduler_type", "constant"]
    whole = run_train(*line(adapter, tmp_path / "whole", *saving))
    run_train(*line(adapter, tmp_path / "halves", *saving, "--max_steps", "1"))
    resumed = run_train(*line(adapter, tmp_path / "halves", *saving))
    assert resumed.state.global_step == 2
    assert torch.allclose(logits(resumed.model), logits(whole.model), atol=1e-5)
    newest, _ = load(str(tmp_path / "halves" / "checkpoint-2"), device="cpu")
    assert torch.allclose(logits(newest), logits(whole.model), atol=1e-5)


def test_an_adapters_own_tokenizer_comes_first(adapter):
    assert load_tokenizer(str(adapter)).chat_template is None
    make_tokenizer(chat_template=CHATML).save_pretrained(adapter)
    assert load_tokenizer(str(adapter)).chat_template == CHATML


def test_a_base_that_is_gone_is_told_with_who_names_it(adapter, tmp_path):
    os.rename(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"there is no folder .*base") as error:
        ORPOTrainer(str(adapter), make_args(tmp_path / "out"), train_dataset=SEVEN)
    assert f"adapter_config.json in {adapter} names this base model" in "".join(error.value.__notes__)


def test_an_adapter_of_the_hub(adapter, tmp_path, monkeypatch):
    """As it lies in the hub's cache, which is asked before the hub."""
    cache = tmp_path / "hub" / "models--someone--adapter"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(adapter, cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    args = make_args(tmp_path / "out", model_init_kwargs={"cache_dir": str(tmp_path / "hub")})
    trainer = ORPOTrainer("someone/adapter", args, train_dataset=SEVEN)
    assert torch.allclose(logits(trainer.model), logits(adapted(adapter)), atol=1e-6)
    line = f"--model_name_or_path someone/adapter --dataset_name nowhere.jsonl --output_dir {tmp_path / 'new'}"
    with pytest.raises(ValueError, match="there is no file or folder nowhere"):
        train.main(f"{line} --merge_adapter".split())


@pytest.mark.parametrize("shared", [True, False], ids=["one disk", "a disk of its own"])
def test_a_second_node_merges_on_a_disk_of_its_own_alone(shared, adapter, tmp_path, monkeypatch):
    """Seen by its first process, which is no first one of the run."""
    args, merged = make_args(tmp_path / "out"), []

    def merge(*places, **options):
        merged.append(places)
        return merge_adapter(*places, **options)

    @contextmanager
    def main_process_first(local=True, desc=""):
        if shared and not local:
            # Rank 0, for which this one waits.
            merge_adapter(tmp_path / "sft", tmp_path / "out/base")
        yield

    monkeypatch.setattr("orpo.trainer.start.merge_adapter", merge)
    monkeypatch.setattr(args, "main_process_first", main_process_first)
    monkeypatch.setattr(type(args), "process_index", 8)
    monkeypatch.setattr(type(args), "local_process_index", 0)
    model = load_start(str(tmp_path / "sft"), args, peft.LoraConfig(r=2))
    assert len(merged) == (not shared)
    assert model.config._name_or_path == str(tmp_path / "out/base")
