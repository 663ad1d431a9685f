"""benchmarks/paper/tables.md: bash reads its blocks, and each command that they come to runs, on tiny models."""

import contextlib
import importlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from tiny import SEVEN, make_model, make_tokenizer
from transformers import BertConfig, BertModel

from orpo import generate
from orpo.cli.arguments import parse
from orpo.recipes import FOLDER

PAGE = Path(__file__).parents[2] / "benchmarks" / "paper" / "tables.md"
PARTS = re.split(r"^## ", PAGE.read_text(), flags=re.M)
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)
INSTALL, JUDGE, NAMES = BLOCK.findall(PARTS[0])
SECTIONS = {part.partition("\n")[0]: BLOCK.findall(part) for part in PARTS[1:]}
ADDED = {
    name: shlex.split(options)
    for name, options in re.findall(r"^\| `(.*?)` \| `(.*?)` \|$", PARTS[0], re.M)
}  # fmt: skip

OPT = {"word_embed_proj_dim": 32, "ffn_dim": 64}
# On the hub, OPT-350M alone has its norm behind, and a projection.
OPT_350M = {"word_embed_proj_dim": 16, "ffn_dim": 64, "do_layer_norm_before": False}
MODELS = {
    "facebook/opt-125m": ("opt", OPT),
    "facebook/opt-350m": ("opt", OPT_350M),
    "facebook/opt-1.3b": ("opt", OPT),
    "microsoft/phi-2": ("phi", {}),
    "meta-llama/Llama-2-7b-hf": ("llama", {}),
    "mistralai/Mistral-7B-v0.1": ("mistral", {"sliding_window": 64}),
    "meta-llama/Meta-Llama-3-8B": ("llama", {}),
    "meta-llama/Llama-2-7b-chat-hf": ("llama", {}),
    "meta-llama/Llama-2-13b-chat-hf": ("llama", {}),
    "HuggingFaceH4/zephyr-7b-alpha": ("mistral", {"sliding_window": 64}),
    "HuggingFaceH4/zephyr-7b-beta": ("mistral", {"sliding_window": 64}),
}
CHAT = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
MODULES = ("orpo.train", "benchmarks.paper.reward", "benchmarks.paper.winrates", "benchmarks.paper.generations")
MODULES = (*MODULES, "benchmarks.paper.diversity", "benchmarks.paper.rlhf")
SHIM = """
note() { printf '%s\\0' "$PWD" "$@" >> "$RECORD"; printf '\\036\\0' >> "$RECORD"; }
for name in accelerate orpo-train orpo-generate trl python alpaca_eval pip hf git mkdir; do
    eval "$name() { note $name \\"\\$@\\"; }"
done
"""


def write_models():
    for name, (model_type, changes) in MODELS.items():
        model = make_model(model_type, **changes).half()
        model.save_pretrained(name)
        if model_type == "opt":
            # As on the hub: a pickle alone.
            Path(name, "model.safetensors").unlink()
            torch.save(model.state_dict(), Path(name, "pytorch_model.bin"))
        options = {} if model_type == "opt" else {"pad_token": None}
        if "chat" in name or "zephyr" in name:
            options["chat_template"] = CHAT
        make_tokenizer(**options).save_pretrained(name)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=400, **sizes)).save_pretrained("tiny-encoder")
    make_tokenizer().save_pretrained("tiny-encoder")


def write_data():
    rows = list(zip(*SEVEN.values(), strict=True))
    dialogues = [
        {side: f"\n\nHuman: {p}\n\nAssistant: {text}" for side, text in (("chosen", c), ("rejected", r))}
        for p, c, r in rows
    ]
    talks = [
        {
            "prompt": p,
            **{
                side: [{"role": "user", "content": p}, {"role": "assistant", "content": text}]
                for side, text in (("chosen", c), ("rejected", r))
            },
        }
        for p, c, r in rows
    ]
    # More than a thousand where the command asks for rows up to that.
    for name, splits, found in (
        ("Anthropic/hh-rlhf", ("train", "test"), dialogues),
        ("HuggingFaceH4/ultrafeedback_binarized", ("train_prefs", "test_prefs"), talks),
        ("argilla/ultrafeedback-binarized-preferences-cleaned", ("train",), talks * 10),
        ("mlabonne/orpo-dpo-mix-40k", ("train",), talks * 20),
    ):
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        parts = [{"split": split, "path": f"{split}.jsonl"} for split in splits]
        head = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": parts}]})
        (folder / "README.md").write_text(f"---\n{head}---\n")
        for split in splits:
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, found)))
    questions = [{"dataset": "ours", "instruction": text} for text in ("hello", "how are you")]
    Path("alpaca_eval.json").write_text(json.dumps(questions))
    folder = Path("FastChat/fastchat/llm_judge/data/mt_bench")
    (folder / "model_answer").mkdir(parents=True)
    asked = [{"question_id": 81 + i, "category": c, "turns": ["hello", "hi"]} for i, c in enumerate(("math", "stem"))]
    (folder / "question.jsonl").write_text("\n".join(map(json.dumps, asked)))


def commands(script, folder):
    """(folder, words) of every command that bash comes to in `script`, after its own expansions."""
    record = folder / "record"
    record.write_text("")
    # Without a PATH, a command that nobody stands in for is an error.
    bash = [shutil.which("bash"), "-euc", f"{SHIM}\nPATH=\n{script}"]
    subprocess.run(bash, check=True, cwd=folder, env={"RECORD": str(record)})
    found = [row.split("\0")[:-1] for row in record.read_text().split("\x1e\0")[:-1]]
    return [(Path(row[0]), row[1:]) for row in found]


def all_commands(folder, program):
    """The commands of all sections that begin with `program`; nothing is run."""
    (folder / "FastChat/fastchat/llm_judge").mkdir(parents=True)
    blocks = [block for blocks in SECTIONS.values() for block in blocks]
    return [words for block in blocks for _, words in commands(NAMES + block, folder) if words[0] == program]


class World:
    """A folder in which the names of the page are tiny models and data sets. Sections run in order, each once."""

    def __init__(self, folder):
        self.folder, self.ran, self.run_with = folder, {}, []

    def section(self, title):
        for name, blocks in SECTIONS.items():
            if name not in self.ran:
                self.ran[name] = [words for block in blocks for words in self.run(block)]
            if name == title:
                return self.ran[name]

    def run(self, block):
        found = commands(NAMES + block, self.folder)
        for where, words in found:
            self.one(where, words)
        return [words for _, words in found]

    def one(self, where, words):
        if words[0] == "accelerate":
            parsed = launch_command_parser().parse_args(words[2:])
            assert words[1] == "launch" and parsed.module and parsed.num_processes == 4
            assert parsed.use_deepspeed != parsed.use_fsdp
            words = ["python", "-m", parsed.training_script, *parsed.training_script_args]
        if words[0] == "orpo-train":
            words = ["python", "-m", "orpo.train", *words[1:]]
        if words[:2] == ["python", "-m"]:
            module, arguments = words[2], words[3:]
            assert module in MODULES
            importlib.import_module(module).main([*arguments, *ADDED.get(module, [])])
            self.check(words)
        elif words[:2] == ["python", "-c"]:
            exec(words[2], {})
        elif words[0] == "mkdir":
            Path(words[-1]).mkdir(exist_ok=True)
        elif words[0] == "orpo-generate":
            generate.main([*words[1:], *ADDED["orpo-generate"]])
            assert Path(option(words, "--output")).stat().st_size > 100
        elif words[0] == "trl":
            self.dpo(words)
        elif words[0] == "alpaca_eval":
            rows = json.loads(Path(option(words, "--model_outputs")).read_text())
            assert [set(row) for row in rows] == [{"dataset", "instruction", "output", "generator"}] * 2
            assert re.match(r"alpaca-[12]/", option(words, "--output_path"))
        else:
            assert words[1] in ("gen_judgment.py", "show_result.py") and words[2] == "--model-list"
            for model in words[3:]:
                lines = (where / f"data/mt_bench/model_answer/{model}.jsonl").read_text().splitlines()
                assert [len(json.loads(line)["choices"][0]["turns"]) for line in lines] == [2, 2]

    def check(self, words):
        """What a script of this project says it writes is there."""
        output = option(words, "--output_dir") or option(words, "--output") or option(words, "--picture")
        if output is None:
            output = yaml.safe_load((FOLDER / f"{option(words, '--config')}.yaml").read_text())["output_dir"]
        assert Path(output).exists() and (not Path(output).is_dir() or Path(output, "config.json").exists() or Path(
            output, "adapter_config.json").exists())  # fmt: skip

    def dpo(self, words):
        folder = option(words, "--output_dir")
        try:
            from trl.cli.main import main
        except ImportError:
            # The commands after it run with the model before it; that DPO itself did not run, a test of its own says.
            shutil.copytree(option(words, "--model_name_or_path"), folder)
            return
        from trl.scripts import dpo

        def launch(script_name, launch_args, training_script_args):
            parsed = launch_command_parser().parse_args([*launch_args, "dpo.py", *training_script_args])
            assert Path(parsed.config_file).is_file() and parsed.num_processes == 4 and script_name == "dpo.py"
            arguments = dpo.make_parser().parse_args_and_config(training_script_args, fail_with_unknown_args=False)
            dpo.main(*arguments[:4])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trl.cli.accelerate_launcher.launch_training_script", launch)
            assert main([*words[1:], *ADDED["trl dpo"]]) == 0
        assert Path(folder, "config.json").exists()
        (state,) = Path(folder).glob("checkpoint-*/trainer_state.json")
        assert json.loads(state.read_text())["best_model_checkpoint"] == f"{folder}/{state.parent.name}"
        self.run_with.append(folder)


def option(words, name):
    return words[words.index(name) + 1] if name in words else None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    import datasets

    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        write_models()
        write_data()
        yield World(folder)


@pytest.mark.parametrize("title", SECTIONS)
def test_the_commands_of_a_section_run_one_after_another(world, title):
    ran = world.section(title)
    assert ran and len(ran) == len({tuple(words) for words in ran})


def test_dpo_runs_too(world):
    pytest.importorskip("trl", reason="needs TRL, which trains with DPO: pip install '.[paper]'")
    world.section(next(title for title in SECTIONS if title.endswith("training")))
    assert len(world.run_with) == 8


def test_launch_lines_are_those_of_the_recipes():
    lines = dict(re.findall(r'^(\w)="(.*)"$', NAMES, re.M))
    page = PAGE.read_text()
    for prefix, recipe in re.findall(r"\$([ZF]) --config ([\w.-]+)", page):
        assert f"# Launch: {lines[prefix]} --config {recipe}\n" in (FOLDER / f"{recipe}.yaml").read_text()


def test_training_has_the_slides_settings(tmp_path):
    """Rate, epochs, scheduler, whether the best epoch is kept, and lambda, of each command with its recipe."""
    arrived = {}
    for words in all_commands(tmp_path, "accelerate"):
        arguments = launch_command_parser().parse_args(words[2:]).training_script_args
        args = parse([*arguments, "--use_cpu", "True", "--bf16", "False"])[2]
        kept = (args.num_train_epochs, args.lr_scheduler_type, args.load_best_model_at_end, args.beta)
        arrived[args.output_dir] = (args.learning_rate, *kept)
    expected = {
        "mistral-orpo-alpha": (8e-6, 1, "cosine", False, 0.1),
        "mistral-orpo-lambda-1": (8e-6, 1, "cosine", False, 1.0),
        "mistral-orpo-beta": (5e-6, 5, "inverse_sqrt", True, 0.1),
    }
    lambdas = {f"{data}-{size}": 0.1 for data in ("hh", "uf") for size in ("125m", "350m", "1.3b")}
    for name, weight in {**lambdas, "phi-2": 0.25, "llama-2": 0.2}.items():
        expected[f"{name}-orpo"] = (8e-6, 10, "cosine", True, weight)
        expected[f"{name}-sft"] = (1e-5, 1, "cosine", True, 0.0)
    assert arrived == expected


def test_figures_3_and_9_have_commands(tmp_path):
    blocks = [b for b in BLOCK.findall(PAGE.with_name("README.md").read_text()) if "accelerate" in b]
    found = []
    for _, words in (command for block in blocks for command in commands(block, tmp_path)):
        arguments = launch_command_parser().parse_args(words[2:]).training_script_args
        model, data, args = parse([*arguments, "--use_cpu", "True", "--bf16", "False"])
        found.append(
            (model.model_name_or_path, data.dataset_name, args.beta, args.learning_rate, args.num_train_epochs)
        )
    mistral = ("mistralai/Mistral-7B-v0.1", "HuggingFaceH4/ultrafeedback_binarized")
    sft = ("facebook/opt-350m", "Anthropic/hh-rlhf", 0.0, 1e-5, 1)
    assert found == [sft, *((*mistral, weight, 8e-6, 1) for weight in (0.1, 0.5, 1.0))]


def test_dpo_has_the_slides_settings(tmp_path):
    pytest.importorskip("trl", reason="needs TRL, which trains with DPO: pip install '.[paper]'")
    from trl.scripts import dpo

    found = all_commands(tmp_path, "trl")
    assert len(found) == 8
    for words in found:
        assert words[1:3] == ["dpo", "--accelerate_config"] and words[4:6] == ["--num_processes", "4"]
        line = [*words[6:], "--use_cpu", "--bf16", "False"]
        args = dpo.make_parser().parse_args_and_config(line, fail_with_unknown_args=False)[1]
        assert (args.beta, args.learning_rate, args.num_train_epochs) == (0.1, 5e-6, 3)
        assert args.lr_scheduler_type == "cosine" and args.load_best_model_at_end
        assert args.save_strategy == args.eval_strategy == "epoch"


def test_what_is_installed_has_an_extra(tmp_path):
    import tomllib

    found = [words for _, words in commands(INSTALL, tmp_path)]
    assert [words[0] for words in found] == ["pip", "hf", "git"]
    extras = tomllib.loads((PAGE.parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [words[:3] for _, words in commands(JUDGE, tmp_path)] == [["pip", "install", "-e"]]
    (asked,) = re.findall(r"\.\[(.*)\]", found[0][2])
    assert set(asked.split(",")) <= set(extras)
