"""What goes wrong on a first day, from the command line: each error says what to do."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from tiny import CHATML, ROWS, SMALL, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel, ViTConfig

from orpo import ORPOTrainer, train
from orpo.cli.arguments import parse
from orpo.cli.errors import run_command

NAME = "is_gradient_checkpointing"
RUN = ["--model_name_or_path", "model", "--dataset_name", "pairs.jsonl"]
pytestmark = pytest.mark.usefixtures("own_cache")


def lines(rows):
    return "\n".join(map(json.dumps, rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first-day")
    make_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    make_model("llama").save_pretrained(folder / "no-tokenizer")
    LlamaModel(LlamaConfig(**SMALL)).save_pretrained(folder / "no-head")
    make_tokenizer().save_pretrained(folder / "no-head")
    ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4).save_pretrained(folder / "vit")
    make_model("llama").save_pretrained(folder / "no-pad")
    make_tokenizer(pad_token=None).save_pretrained(folder / "no-pad")
    talks = [{side: [{"role": "user", "content": "a"}, {"role": "assistant", "content": row[side]}] for side in
              ("chosen", "rejected")} for row in ROWS]  # fmt: skip
    for name, text in {
        "pairs.jsonl": lines(ROWS),
        "other-columns.jsonl": lines([{"question": r["prompt"], "good": r["chosen"]} for r in ROWS]),
        "talks.jsonl": lines(talks),
        "empty.jsonl": "",
        "empty.json": "[]",
        "header.csv": "prompt,chosen,rejected\n",
        "one-line-broken.jsonl": lines(ROWS[:3]) + '\n{"prompt": \n',
        "broken.jsonl": '{"prompt": "a", "chosen": \n nonsense',
    }.items():
        (folder / name).write_text(text)
    return folder


def run(folder, output, model="model", data="pairs.jsonl", **options):
    options = {"output_dir": output, "max_steps": 1, "logging_steps": 1, "use_cpu": True, **options}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    train.main(["--model_name_or_path", str(folder / model), "--dataset_name", str(folder / data), *words])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("other-columns.jsonl", r"needs the columns 'chosen' .* this one has \['good', 'question'\]: rename"),
        ("talks.jsonl", r"no chat template to render them with: set tokenizer\.chat_template \(--chat_template\)"),
        ("empty.jsonl", "is empty; it needs rows with prompt, chosen and rejected"),
        ("empty.json", "has no row in 'train': it is empty"),
        ("header.csv", "has no row in 'train': it is empty"),
        ("broken.jsonl", r"could not be read as json: .*JSON"),
        ("pears.jsonl", "there is no file or folder"),
    ],
)
def test_data(data, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path, data=data)


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is no file or folder pears\.jsonl"):
        run(folder, tmp_path, dataset_name="pears.jsonl")


def test_a_part_without_rows(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no row in 'train\[:1%\]': .* too few rows for that part"):
        run(folder, tmp_path, do_eval=True, dataset_test_split="train[:1%]")


def test_a_template_on_the_command_line_helps(folder, tmp_path):
    run(folder, tmp_path, data="talks.jsonl", chat_template="{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no-head", r"no-head holds a model without its head \(lm_head\), which would be trained from random weights"),
        ("no-tokenizer", "holds a model without its tokenizer: save it there"),
        ("vit", "vit is a vit model, which has no language-modeling head"),
        ("nothing", "there is no folder .*nothing to load a model from"),
    ],
)
def test_models(model, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path, model=model)


def test_a_tied_head_is_not_missing(folder, tmp_path):
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    make_tokenizer().save_pretrained(tmp_path / "tied")
    run(tmp_path, tmp_path / "out", model="tied", dataset_name=folder / "pairs.jsonl")


def test_no_pad_token_is_no_problem(folder, tmp_path):
    for model in ("model", "no-pad"):
        run(folder, tmp_path / model, model=model)
    with_pad, without = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "no-pad"))
    for name, weight in with_pad.state_dict().items():
        assert torch.equal(weight, without.state_dict()[name]), name


def test_flash_attention_that_is_not_installed(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match="FlashAttention2") as caught:
        run(folder, tmp_path, attn_implementation="flash_attention_2")
    assert "attn_implementation sdpa" in caught.value.__notes__[0]


def test_too_little_memory(folder, tmp_path, monkeypatch):
    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(ORPOTrainer, "training_step", step)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(folder, tmp_path, per_device_train_batch_size=8)
    (advice,) = caught.value.__notes__
    assert "per_device_train_batch_size 1 and gradient_accumulation_steps 8" in advice
    assert "use_peft" in advice and "gradient_checkpointing" not in advice


def test_training_on_a_cpu_needs_no_triton(folder, tmp_path):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from orpo import train\n"
        f"train.main(['--model_name_or_path', {str(folder / 'model')!r}, '--dataset_name', "
        f"{str(folder / 'pairs.jsonl')!r}, '--output_dir', {str(tmp_path)!r}, '--max_steps', '1', '--use_cpu'])\n"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--lerning_rate", "1e-4"], 1, "orpo-train: --lerning_rate is no option, did you mean --learning_rate?"),
        (["--zzz=1"], 1, "orpo-train: --zzz=1 is no option"),
        (["stray"], 1, "orpo-train: nothing takes stray"),
        (["--max_steps", "many"], 2, "invalid int value: 'many'; options: orpo-train --help"),
        (["--config", "smollm3"], 1, "no such file, and no recipe; the recipes are"),
        (["--config", "typo.yaml"], 1, "options that do not exist: lerning_rate (did you mean learning_rate?)"),
        (["--config", "broken.yaml"], 1, "broken.yaml is not YAML: "),
        (["--model_name_or_path", "model", "--dataset_name", "pears.jsonl"], 1, "there is no file or folder pears"),
        (["--model_name_or_path", "model", "--dataset_name", "pairs.jsonl", "--load_in_4bit"], 1, "pip install bits"),
        (["--model_name_or_path", "model", "--dataset_name", "pairs.jsonl", "--output_dir", "pairs.jsonl"], 1,
         "output_dir pairs.jsonl is a file"),
        ([*RUN, "--eval_strategy", "steps"], 1, "to evaluate on: --eval_dataset_name FILE, or parts of the one data"),
        ([*RUN, "--generate_during_eval"], 1, "nothing is evaluated: give --eval_strategy steps and --eval_dat"),
        ([*RUN, "--chat_template", "none.jinja"], 1, "--chat_template is 'none.jinja': no such file"),
        ([*RUN, "--use_peft", "--lora_target_modules", "foo"], 1, "--lora_target_modules takes all-linear, or some of"),
        ([*RUN, "--dataset_name", "one-line-broken.jsonl"], 1, "line 4 is no JSON: Expecting value in column 12"),
        ([*RUN, "--config", "smollm2-lora", "--max_length", "64"], 1, "lower --max_prompt_length too"),
        ([*RUN, "--config", "smollm2-lora", "--max_length", "64"], 1, "smollm2-lora sets max_prompt_length to 512"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_a_few_plain_lines(words, code, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("ORPO_TRACEBACK", raising=False)
    monkeypatch.setattr("orpo.packages._is_installed", lambda package: package != "bitsandbytes")
    (folder / "typo.yaml").write_text("lerning_rate: 1e-4\n")
    (folder / "broken.yaml").write_text("beta: [0.1\n")
    with pytest.raises(SystemExit) as stop:
        run_command("orpo-train", lambda: train.main([*words, "--use_cpu"]))
    said = capsys.readouterr().err
    assert stop.value.code == code and message in said
    # Behind progress bars, where something was read before.
    told = said[said.index("orpo-train: ") :].strip().splitlines()
    assert "Traceback" not in said and len(told) <= 3
    assert not (folder / "trainer_output").exists()


def test_a_refused_run_leaves_what_was_there(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for output in ("empty", "new/folder"):
        with pytest.raises(ValueError, match="rename its columns"):
            run(folder, tmp_path / output, data="other-columns.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_bare_bf16_is_true_and_a_cpu_has_to_be_named(tmp_path, monkeypatch):
    monkeypatch.setattr("orpo.trainer.config.is_torch_bf16_gpu_available", lambda: False)
    line = ["--output_dir", str(tmp_path), "--bf16"]
    assert parse([*line, "--use_cpu"])[2].bf16 is True
    assert parse([*line, "false", "--use_cpu", "--nll_scores_eos"])[2].nll_scores_eos is True
    with pytest.raises(ValueError, match="on a CPU, add --use_cpu"):
        parse(line)


def test_a_file_of_held_out_pairs_needs_no_split(folder, tmp_path):
    run(folder, tmp_path, eval_dataset_name=folder / "pairs.jsonl")
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"] > 0


@pytest.mark.parametrize("form", ["strings", "talks"])
def test_strings_for_a_model_with_a_template_are_pointed_at(form, folder, tmp_path, capsys):
    make_model("llama").save_pretrained(tmp_path / "chat")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "chat")
    data = folder / ("pairs.jsonl" if form == "strings" else "talks.jsonl")
    for streaming in (False, True):
        run(tmp_path, tmp_path / f"out-{streaming}", model="chat", dataset_name=data, dataset_streaming=streaming)
        hint = "the prompts are strings, trained as they are although the tokenizer has a chat template"
        assert capsys.readouterr().out.count(hint) == (form == "strings")
    run(folder, tmp_path / "plain")
    assert "although the tokenizer" not in capsys.readouterr().out


def test_pefts_deprecated_name_is_no_ones_concern(recwarn):
    run_command("orpo-train", lambda: warnings.warn(f"`{NAME}` is deprecated and more", FutureWarning, stacklevel=1))
    run_command("orpo-train", lambda: warnings.warn("`another` is deprecated", FutureWarning, stacklevel=1))
    assert [str(warning.message) for warning in recwarn] == ["`another` is deprecated"]


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setenv("ORPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such file"):
        run_command("orpo-train", lambda: train.main(["--config", "smollm3"]))
    monkeypatch.delenv("ORPO_TRACEBACK")
    for fault in (lambda: torch.ones(2).view(3), lambda: {}["key"], lambda: json.loads("{")):
        with pytest.raises((RuntimeError, KeyError, ValueError)):
            run_command("orpo-train", fault)
