"""The command line from a model and a file of pairs to a trained model."""

import csv
import gzip
import json
import logging
from types import SimpleNamespace

import datasets
import pytest
from tiny import ROWS, make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from orpo import train
from orpo.cli.arguments import parse
from orpo.data.files.sources import NoSuchSplit, load_pairs, reader_for


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    lines = "\n".join(map(json.dumps, ROWS))
    (folder / "pairs.jsonl").write_text(lines)
    with gzip.open(folder / "pairs.jsonl.gz", "wt") as file:
        file.write(lines)
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "pairs.parquet")
    (folder / "pairs.txt").write_text(lines)
    return folder


pytestmark = pytest.mark.usefixtures("own_cache")


def options(files, output, **changes):
    chosen = {
        "model_name_or_path": files / "model",
        "dataset_name": files / "pairs.jsonl.gz",
        "dataset_train_split": "train[2:]",
        "dataset_test_split": "train[:2]",
        "output_dir": output,
        "max_steps": 2,
        "learning_rate": "1e-3",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "logging_steps": 1,
        "use_cpu": True,
        **changes,
    }
    return [part for name, value in chosen.items() for part in (f"--{name}", str(value))]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet"])
def test_local_files(name, files):
    assert load_pairs(str(files / name)).to_list() == ROWS
    assert load_pairs(str(files / name), "train[5:]").to_list() == ROWS[5:]
    assert list(load_pairs(str(files / name), streaming=True)) == ROWS


def test_a_folder_of_files(files, tmp_path):
    for split, rows in (("train", ROWS[:5]), ("test", ROWS[5:])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_pairs(str(tmp_path), "test").to_list() == ROWS[5:]


def test_sources_that_cannot_be_read(files):
    with pytest.raises(ValueError, match=r"pairs\.txt is of no known kind"):
        load_pairs(str(files / "pairs.txt"))
    with pytest.raises(ValueError, match="there is no file or folder"):
        load_pairs(str(files / "nothing.jsonl"))
    with pytest.raises(NoSuchSplit, match="has no split 'test'"):
        load_pairs(str(files / "pairs.jsonl"), "test")
    assert reader_for("a.JSON.zst") == "json" and reader_for("a.gz") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": "x"}\n\n{"a": \n', "line 3 is no JSON: Expecting value in column 7"),
        ('{"a": "x"}\n[1]\n', r"line 2 is \[1\], no JSON object"),
    ],
)
@pytest.mark.parametrize("name", ["broken.jsonl", "broken.json", "broken.jsonl.gz"])
def test_lines_of_a_broken_file_are_counted_from_1(name, text, message, tmp_path, monkeypatch):
    with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wt") as file:
        file.write(text)
    logger, records = logging.getLogger("datasets.packaged_modules.json.json"), []
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, SimpleNamespace(level=0, handle=records.append)])
    with pytest.raises(ValueError, match=rf"{name} could not be read as json: {message}"):
        load_pairs(str(tmp_path / name))
    assert not records and not logger.disabled


@pytest.mark.parametrize(
    "content",
    [gzip.compress(b""), gzip.compress(b"{}" * 99)[:-9], b"no gzip"],
    ids=["empty", "cut off", "not compressed"],
)
def test_a_compressed_file_without_rows_is_refused_with_its_name(content, tmp_path):
    (tmp_path / "pairs.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"pairs\.jsonl\.gz"):
        load_pairs(str(tmp_path / "pairs.jsonl.gz"))


def test_a_json_file_over_many_lines_is_no_broken_one(tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps(ROWS, indent=1))
    assert load_pairs(str(tmp_path / "pairs.json")).to_list() == ROWS
    (tmp_path / "pairs.json").write_text(json.dumps(ROWS, indent=1)[:-5])
    with pytest.raises(ValueError) as caught:
        load_pairs(str(tmp_path / "pairs.json"))
    assert "line 1 " not in str(caught.value)


def test_a_run_from_the_command_line(files, tmp_path):
    train.main(options(files, tmp_path))
    AutoModelForCausalLM.from_pretrained(tmp_path)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert {"train_loss", "eval_loss", "eval_rewards/accuracies"} <= results.keys()
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_nll_loss" in entry for entry in history) == 3
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "log_odds_chosen" in (tmp_path / "curves.csv").read_text()


def test_a_run_goes_on_where_it_stopped(files, tmp_path):
    train.main(options(files, tmp_path))
    train.main(options(files, tmp_path, max_steps=3))
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"beta was 0\.1 and is 0\.5"):
        train.main(options(files, tmp_path, beta=0.5))
    train.main(options(files, tmp_path, beta=0.5, max_steps=1, resume_from_checkpoint=False))
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1]


def test_a_finished_run_keeps_its_figures_and_gets_the_model_that_was_not_saved(files, tmp_path, capsys):
    """As if it had been killed after its last checkpoint, in the middle of an epoch."""
    line = options(files, tmp_path, max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    train.main(line)
    weights, loss = (tmp_path / "model.safetensors").read_bytes(), (tmp_path / "train_results.json").read_text()
    (tmp_path / "model.safetensors").unlink()
    train.main(line)
    assert "the run is finished, step 3 of 3: nothing is trained" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "train_results.json").read_text() == loss
    assert [path.name for path in tmp_path.glob("checkpoint-4")] == []


def test_lora_from_the_command_line(files, tmp_path):
    train.main(options(files, tmp_path, use_peft=True, max_steps=1))
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (16, 32)


def test_all_linear_reaches_peft_as_its_word(tmp_path):
    line = ["--use_peft", "true", "--lora_target_modules", "all-linear", "--output_dir", str(tmp_path)]
    assert parse(line)[0].peft_config().target_modules == "all-linear"


def test_a_file_gives_defaults_that_the_line_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: m\nlearning_rate: 8e-6\nbeta: 0.5\nuse_peft: true\nlora_target_modules: [q_proj]\n"
    )
    line = ["--config", str(file), "--beta", "0.25", "--output_dir", str(tmp_path)]
    model_args, data_args, args = parse(line)
    assert (model_args.model_name_or_path, model_args.use_peft) == ("m", True)
    assert model_args.peft_config().target_modules == {"q_proj"}
    assert (args.learning_rate, args.beta, data_args.dataset_train_split) == (8e-6, 0.25, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [("learning_rat: 1", "options that do not exist: learning_rat"), ("- beta", "a mapping of options, not a list")],
)
def test_files_with_mistakes(text, message, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--model_name_or_path", "m"], "m is given, but not --dataset_name"),
        (["--dataset_name", "d"], "d is given, but not --model_name_or_path"),
    ],
)
def test_half_a_call_is_refused(line, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train.main([*line, "--output_dir", str(tmp_path)])


def test_a_run_of_no_epoch_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match="num_train_epochs is 0, and max_steps is not given: nothing would be trained"):
        train.main(options(files, tmp_path, max_steps=-1, num_train_epochs=0))


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ([], {"device": None}),
        (["--use_cpu", "--seed", "3", "--output_dir=demo"], {"device": "cpu", "seed": 3, "output_dir": "demo"}),
    ],
)
def test_without_model_and_data_the_demonstration_runs(line, call, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("orpo.demo.run_demo", lambda **options: calls.append(options))
    train.main(line)
    assert calls == [call]
    assert capsys.readouterr().out.startswith("no model and no data set are given: the demonstration")


def test_help_lists_every_kind_of_option(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help_all"])
    text = capsys.readouterr().out
    for option in ("--model_name_or_path", "--dataset_name", "--beta", "--learning_rate", "--config", "--lora_r"):
        assert option in text
    assert text.splitlines()[0] == "usage: orpo-train [--config FILE] [--option value ...]"
    assert "\n    orpo-train --config run.yaml --learning_rate 8e-6  " in text and "``" not in text
    assert "(default: trl)" in text
    said = text[text.index("--resume_from_checkpoint") :][:600]
    assert "Not directly used by Trainer" not in said and "anew" in said


@pytest.mark.parametrize("line", [["--beta", "0.2"], ["--max-steps=3"], ["--save_steps", "3"]])
def test_the_demonstration_takes_no_settings_of_a_run(line, monkeypatch):
    monkeypatch.setattr("orpo.demo.run_demo", lambda **options: pytest.fail("it runs"))
    with pytest.raises(SystemExit, match="is given, but no model and no data set; with neither, the demo"):
        train.main(line)


def test_hyphens_are_options_of_the_demonstration_too(monkeypatch):
    calls = []
    monkeypatch.setattr("orpo.demo.run_demo", lambda **options: calls.append(options))
    train.main(["--output-dir", "there", "--use-cpu"])
    assert calls == [{"device": "cpu", "output_dir": "there"}]


def test_curves_end_with_the_last_step_though_the_best_weights_are_evaluated_last(files, tmp_path):
    changes = dict(load_best_model_at_end=True, learning_rate=5, max_steps=3, save_strategy="steps")
    train.main(options(files, tmp_path, **changes))
    with open(tmp_path / "curves.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "eval"]
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [row["step"] for row in rows] == ["1", "2", "3"] and state["best_global_step"] < 3
    last = [entry["eval_loss"] for entry in state["log_history"] if entry["step"] == 3 and "eval_loss" in entry]
    # The second is that of the best weights.
    assert len(last) == 2 and last[0] > last[1] == pytest.approx(state["best_metric"])
    assert float(rows[-1]["loss"]) == last[0]
