"""A YAML file of options, and what is wrong in one, with its line."""

import pytest

from orpo.cli.arguments import parse


@pytest.fixture
def options(tmp_path):
    """The three sets of options that a YAML file gives."""

    def read(text, *line):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return parse(["--config", str(path), "--use_cpu", "--output_dir", str(tmp_path), *line])

    return read


def test_values_are_taken_as_the_line_takes_them(options):
    model, data, args = options(
        "learning_rate: 1e-4\nmax_steps: 100.0\nbeta: 1\nlora_target_modules: q_proj\nuse_peft: 'no'\n"
        "dataset_name: 3\nmodel_name_or_path: 2024-01-01\nnll_scores_eos: 0\nlr_scheduler_type: cosine\n"
        "lr_scheduler_kwargs: {num_cycles: 1}\nlabel_names: [a, 1]\nmax_length: null\nlora_r: 8.0\n"
    )
    assert (args.learning_rate, args.max_steps, args.beta, args.nll_scores_eos) == (1e-4, 100, 1, False)
    assert (model.lora_target_modules, model.use_peft, model.lora_r) == (["q_proj"], False, 8)
    assert (data.dataset_name, model.model_name_or_path) == ("3", "2024-01-01")
    assert args.lr_scheduler_kwargs == {"num_cycles": 1} and args.max_length is None and args.label_names == ["a", "1"]


@pytest.mark.parametrize(
    ("written", "number"),
    [("0100", 100), ("-0", 0), ("1_000", 1000), ("0x10", 16), ("09", 9), ("1e3", 1000), ("+5", 5)],
)
def test_numbers_are_those_of_yaml_1_2(written, number, options):
    args = options(f"learning_rate: {written}\nmax_steps: {written}\n")[2]
    assert (args.learning_rate, args.max_steps) == (number, number)


def test_numbers_within_a_mapping(options):
    text = "lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {lr_end: 1e-7, power: 2}\n"
    assert options(text)[2].lr_scheduler_kwargs == {"lr_end": 1e-7, "power": 2}


@pytest.mark.parametrize("text", ["0100", "1:30", "1_000", "1.10", "2e3", "2024-01-01", "0x1F", "007", "1234567e8"])
def test_text_stays_as_it_is_written(text, options):
    _, data, args = options(f"run_name: {text}\ndataset_config: {text}\nlabel_names: [{text}, {text}]\n")
    assert (args.run_name, data.dataset_config, args.label_names) == (text, text, [text, text])
    assert options(f"lora_target_modules: {text}\n")[0].lora_target_modules == [text]
    assert options(f"<<: {{run_name: a}}\nmodel_revision: {text}\n")[0].model_revision == text


def test_no_and_off_are_words(options):
    args = options("eval_strategy: no\nsave_strategy: off\nlogging_strategy: no\nreport_to: no\n")[2]
    assert (args.eval_strategy, args.save_strategy, args.logging_strategy, args.report_to) == ("no", "no", "no", [])
    assert options("report_to:\n")[2].report_to == []


def test_an_empty_file_and_a_merged_mapping(options):
    assert options("")[2].beta == 0.1
    assert options("<<: {beta: 0.5, lora_r: 4}\nlora_r: 2\n")[2].beta == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 1\nlearning_rate: [1e-4]\n", r"run\.yaml, line 2: learning_rate is \[0\.0001\]; it has to be a number"),
        ("beta: {a: 1}\n", r"line 1: beta is {'a': 1}; it has to be a number or null"),
        ("max_steps: 1.5\n", r"max_steps is 1\.5; it has to be a whole number"),
        ("max_steps: true\n", "max_steps is true; it has to be a whole number"),
        ("\n\nmax_steps: many\n", "line 3: max_steps is 'many'; it has to be a whole number"),
        ("use_peft: [true]\n", r"use_peft is \[True\]; it has to be true or false"),
        ("use_peft: 3\n", "use_peft is 3; it has to be true or false"),
        ("use_peft: maybe\n", "use_peft is 'maybe'; it has to be true or false"),
        ("learning_rate:\n", "learning_rate is empty; it has to be a number"),
        ("model_name_or_path: {a: 1}\n", "it has to be text or null"),
        ("dataset_name: [a, b]\n", r"dataset_name is \['a', 'b'\]; it has to be text or null"),
        ("lora_target_modules: [{a: 1}]\n", "it has to be a list or null"),
        ("preset: [trl]\n", r"preset is \['trl'\]; it has to be text"),
        ("lr_scheduler_kwargs: [1]\n", r"lr_scheduler_kwargs is \[1\]; it has to be text or a mapping or null"),
        ("beta: .nan\n", "beta is nan; it has to be 0 or more"),
        ("1: 2\n", r"run\.yaml holds 1, which is no name of an option"),
        ("no: 2\nbetta: 1\n", "holds False, which is no name"),
        ("~: 2\n", "holds None, which is no name"),
        ("beta: 0.1\nseed: 1\nbeta: 0.5\n", "sets beta twice, in line 1 and in line 3"),
        ("seed: 1\nconfig: other.yaml\n", "line 2: config does nothing in a file, it is an option of the command line"),
        ("help: true\n", "help does nothing in a file"),
        ("list_recipes: true\n", "list_recipes does nothing in a file"),
        ("print_config: fsdp2\n", "print_config does nothing in a file"),
        ("orpo_alpha: 1\n", r"do not exist: orpo_alpha \(the name in axolotl for beta\)"),
        ("pref_loss: orpo\n", r"pref_loss \(the name in LLaMA-Factory for nothing: orpo-train does ORPO alone"),
        ("learning-rate: 1\n", r"learning-rate \(did you mean learning_rate\?\)"),
        ("beta: *x\n", "is not YAML: found undefined alias"),
        ("beta: 1\n---\nbeta: 2\n", "is not YAML"),
        ("output_dir: !!timestamp 2024-13-45\n", "is not YAML: month must be in"),
        ("seed: 1\nmax_steps: 1:30\n", "line 2: max_steps is '1:30'; it has to be a whole number"),
        ("learning_rate: 1:30.5\n", "learning_rate is '1:30.5'; it has to be a number"),
        ("max_steps: 0o17\n", "max_steps is '0o17'; it has to be a whole number"),
        ("max_steps: 0b11\n", "max_steps is '0b11'; it has to be a whole number"),
        ("logging_steps: 2024-01-01\n", "logging_steps is '2024-01-01'; it has to be a number"),
        ("beta: " + "[" * 5000 + "]" * 5000, "is nested too deep"),
        (
            "# Größe\noutput_dir: Größe\n".encode("latin-1"),
            r"run\.yaml is not UTF-8: line 1 has the byte 0xf6; save it",
        ),
        (b"\xff\xfe\x00", "is not UTF-8"),
    ],
)
def test_mistakes_are_told_with_their_line(options, text, message):
    with pytest.raises(ValueError, match=message):
        options(text)
