"""LoRA and QLoRA as a user meets them: packages that are missing, adapters saved, resumed, merged and reloaded."""

import json
import sys

import peft
import pytest
import torch
from tiny import ROWS, SEVEN, make_model, make_tokenizer
from trainers import logged, make_args, make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from orpo import ORPOTrainer, merge, train
from orpo.cli.arguments import parse
from orpo.cli.run import train as run_train
from orpo.merge import merge_adapter
from orpo.trainer.adapt import wrap_peft

IDS = torch.arange(3, 60)[None]


pytestmark = pytest.mark.usefixtures("own_cache")


def save_base(folder, **changes):
    make_model("llama", **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))


def lora_line(folder, output, **changes):
    options = {
        "model_name_or_path": folder,
        "dataset_name": folder / "pairs.jsonl",
        "output_dir": output,
        "use_peft": True,
        "max_steps": 3,
        "learning_rate": "5e-2",
        "logging_steps": 1,
        "use_cpu": True,
        **changes,
    }
    # Some options take several words.
    return [
        word
        for name, value in options.items()
        for word in (f"--{name}", *(value if isinstance(value, list) else [str(value)]))
    ]


class StopAt(TrainerCallback):
    """Ends a run early, its schedule being that of the whole one."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("output", ["base", "out"])
def test_a_merged_model_is_not_written_over_what_it_is_made_from(output, tmp_path):
    save_base(tmp_path / "base")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), peft.LoraConfig(r=2))
    adapted.save_pretrained(tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / output).iterdir())
    with pytest.raises(ValueError, match=f"would overwrite its .*{output} is its folder"):
        merge_adapter(tmp_path / "out", tmp_path / "." / output)
    assert sorted(path.name for path in (tmp_path / output).iterdir()) == before


@pytest.mark.parametrize(
    "adapted",
    [
        {"lora_target_modules": ["all-linear"]},
        {"lora_target_modules": ["q_proj", "lm_head"]},
        {"lora_target_modules": ["q_proj"], "lora_modules_to_save": ["lm_head"]},
    ],
    ids=["linear layers", "head by LoRA", "head whole"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_the_merged_model_gives_the_adapters_logits(adapted, tied, tmp_path):
    save_base(tmp_path / "base", tie_word_embeddings=tied)
    train.main(lora_line(tmp_path / "base", tmp_path / "out", merge_adapter=True, **adapted))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(base)
    expected = logits(peft.PeftModel.from_pretrained(base, tmp_path / "out"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert (expected - before).abs().max() > 1e-2
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    assert not (tmp_path / "out" / "merged" / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "merged")("hello")["input_ids"]


def test_the_logits_of_training_are_those_of_the_saved_adapter(tmp_path):
    save_base(tmp_path / "base", tie_word_embeddings=True)
    line = lora_line(tmp_path / "base", tmp_path / "out", lora_target_modules=["q_proj", "lm_head"])
    trainer = run_train(*parse(line))
    merged = merge_adapter(tmp_path / "out", tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(trainer.model), atol=1e-5)


def test_merging_as_a_command(tmp_path, monkeypatch, capsys):
    save_base(tmp_path / "base")
    train.main(lora_line(tmp_path / "base", tmp_path / "out"))
    output = str(tmp_path / "half")
    monkeypatch.setattr(sys, "argv", ["merge", str(tmp_path / "out"), output, "--dtype", "bfloat16"])
    merge.main()
    assert capsys.readouterr().out.strip().endswith(output)
    assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == torch.bfloat16


def test_what_cannot_be_merged_is_refused(tmp_path):
    save_base(tmp_path / "base")
    with pytest.raises(ValueError, match=r"base holds no adapter: adapter_config\.json and"):
        merge_adapter(tmp_path / "base", tmp_path / "out")
    with pytest.raises(ValueError, match="merge_adapter is given without use_peft"):
        train.main(lora_line(tmp_path / "base", tmp_path / "out", use_peft=False, merge_adapter=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "with dropout"])
def test_a_lora_run_resumes_with_the_losses_of_an_uninterrupted_one(dropout, tmp_path):
    def trainer(folder):
        config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2}
        return make_trainer(folder, peft_config=config, disable_dropout=not dropout, **settings)

    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "halves")
    first.add_callback(StopAt(2))
    first.train()
    assert len(logged(first, "loss")) == 2
    second = trainer(tmp_path / "halves")
    second.train(resume_from_checkpoint=True)
    assert logged(second, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-6)
    trained = {name: p for name, p in whole.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for name, parameter in second.model.named_parameters():
        if name in trained:
            assert torch.allclose(parameter, trained[name], atol=1e-7), name


@pytest.mark.parametrize(
    ("package", "options"),
    [
        ("bitsandbytes", {"load_in_4bit": True}),
        ("bitsandbytes", {"load_in_8bit": True}),
        ("bitsandbytes", {"optim": "paged_adamw_8bit"}),
        ("peft", {}),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(package, options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    save_base(tmp_path / "base")
    setting = next(iter(options), "use_peft")
    with pytest.raises(ImportError, match=rf"^{setting}.* needs {package}, which is not installed: pip install"):
        train.main(lora_line(tmp_path / "base", tmp_path / "out", **options))


def test_torchaos_optimizers_need_no_bitsandbytes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    save_base(tmp_path / "base")
    # Whatever comes of it here, where torchao may be missing too, it is not a word about bitsandbytes.
    try:
        train.main(lora_line(tmp_path / "base", tmp_path / "out", optim="adamw_torch_8bit"))
    except ImportError as error:
        assert "torchao" in str(error)


def test_a_peft_config_without_peft(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="peft_config needs peft, which is not installed: pip install peft"):
        make_trainer(tmp_path, peft_config=object())


def test_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which also computes on a CPU")
    # bitsandbytes wants multiples of 32 on a CPU.
    save_base(tmp_path / "base", hidden_size=64, intermediate_size=128, head_dim=32)
    line = lora_line(tmp_path / "base", tmp_path / "out", load_in_4bit=True, use_bnb_nested_quant=True)
    line += ["--lora_target_modules", "all-linear", "--merge_adapter", "true"]
    trainer = run_train(*parse(line))
    assert trainer.model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.uint8
    losses = logged(trainer, "loss")
    assert len(losses) == 3 and losses[-1] < losses[0]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert merged.dtype == torch.float32
    # Rounded weights: the same adapter, not quite the same logits.
    assert (logits(merged) - logits(trainer.model)).abs().mean() < 0.2 * logits(merged).abs().mean()


def test_a_quantized_head_is_refused_in_words(tmp_path):
    model = make_model("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(100, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="load the model with its head unquantized"):
        ORPOTrainer(model=model, args=make_args(tmp_path), train_dataset=SEVEN, processing_class=make_tokenizer())


def test_the_adapter_names_the_revision_that_it_was_trained_on(tmp_path):
    for revision in ("step1000", None):
        config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        args = make_args(tmp_path, model_init_kwargs={"revision": revision} if revision else None)
        assert wrap_peft(make_model("llama"), args, config).peft_config["default"].revision == revision
