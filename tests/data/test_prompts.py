"""What a model was trained to continue is what orpo-generate has it continue."""

import json

import peft
import pytest
from tiny import CHATML, ROWS, SEVEN, make_model, make_tokenizer
from trainers import make_trainer

from orpo.data.prepare import Limits, prepare_dataset
from orpo.generate import main
from orpo.generation import generate, load
from orpo.merge import merge_adapter
from orpo.tokens.prompts import boundary_note, prompt_tokens

TURNS = [
    {side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}] for side in row}
    for row in ({"prompt": r["prompt"], "chosen": r["chosen"], "rejected": r["rejected"]} for r in ROWS)
]
TURNS = [{side: row[side] for side in ("chosen", "rejected")} for row in TURNS]
DIALOGUES = [
    {side: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[side]}" for side in ("chosen", "rejected")} for row in ROWS
]


def answers(model, tokenizer, **options):
    return generate(model, tokenizer, ["hello"], max_new_tokens=6, **options)


@pytest.mark.parametrize(
    ("data", "turn"),
    [(SEVEN, False), (ROWS, False), (DIALOGUES, False), (TURNS, True)],
    ids=["columns", "strings", "dialogues", "conversations"],
)
def test_a_saved_folder_remembers_how_its_prompts_were_rendered(data, turn, tmp_path, capsys):
    tokenizer = make_tokenizer(chat_template=CHATML)
    trainer = make_trainer(
        tmp_path / "out", train_dataset=data, tokenizer=tokenizer, save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        model, saved = load(str(folder), device="cpu")
        wanted, other = answers(model, saved, chat_template=turn), answers(model, saved, chat_template=not turn)
        assert wanted != other and answers(model, saved) == wanted
    capsys.readouterr()
    line = [str(tmp_path / "out"), "--prompt", "hello", "--max_new_tokens", "6", "--device", "cpu"]
    said = {}
    for option in ("", "--chat_template", "--no_chat_template"):
        main([*line, *([option] if option else [])])
        said[option] = capsys.readouterr().out
    assert said[""] == said["--chat_template" if turn else "--no_chat_template"]
    assert said["--chat_template"] != said["--no_chat_template"]


def test_a_merged_adapter_remembers_too(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")
    tokenizer = make_tokenizer(chat_template=CHATML)
    tokenizer.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model, _ = load(str(tmp_path / "base"), device="cpu")
    trainer = make_trainer(tmp_path / "out", model=model, tokenizer=tokenizer, peft_config=config)
    trainer.save_model()
    merge_adapter(tmp_path / "out", tmp_path / "merged")
    model, saved = load(str(tmp_path / "merged"), device="cpu")
    assert answers(model, saved) == answers(model, saved, chat_template=False)


def test_a_model_of_unknown_past_is_given_turns(tmp_path):
    model, tokenizer = make_model("llama"), make_tokenizer(chat_template=CHATML)
    assert answers(model, tokenizer) == answers(model, tokenizer, chat_template=True)


@pytest.mark.parametrize("end", [" ", "  ", "\n", ":\n\n", " \n ", "", "."])
def test_training_and_generation_share_the_tokens_before_an_answer(end, tmp_path):
    """The tokenizer merges a space with the answers' first letter."""
    tokenizer, prompt = make_tokenizer(), f"What is your name?{end}"
    row = {"prompt": prompt, "chosen": "a name", "rejected": "are you"}
    (pair,) = prepare_dataset([row], tokenizer, Limits(), report=lambda _: None)
    trained = pair["chosen_input_ids"][: pair["chosen_prompt_length"]]
    assert [tokenizer.bos_token_id, *prompt_tokens(prompt, tokenizer)] == trained
    whole = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert (len(whole) == len(trained) - 1) == (not end.endswith(" "))


def test_the_space_of_the_prompt_is_no_part_of_the_answer():
    tokenizer, asked = make_tokenizer(), []

    class Model:
        """Answers " a name", and notes what it is asked."""

        def __init__(self):
            self.plain = make_model("llama")

        def generate(self, input_ids, attention_mask):
            asked.append(input_ids[attention_mask.bool()].tolist())
            end = tokenizer(" a name", add_special_tokens=False)["input_ids"]
            return input_ids.new_tensor([[*input_ids[0].tolist(), *end, tokenizer.eos_token_id]])

        def __getattr__(self, name):
            return getattr(self.plain, name)

    for prompt, answer in (("Who? ", "a name"), ("Who?", " a name")):
        assert generate(Model(), tokenizer, [prompt]) == [answer]
    assert asked[0] == asked[1]


def test_a_prompt_that_ends_in_a_space_is_told(tmp_path, capsys):
    data = [{**row, "prompt": row["prompt"] + " "} for row in ROWS]
    make_trainer(tmp_path, train_dataset=data)
    assert "the first prompt ends in ' ', whose last token goes to the answer's first word" in capsys.readouterr().out
    make_trainer(tmp_path)
    assert "first prompt ends" not in capsys.readouterr().out


def test_the_prompts_file_is_not_written_over(tmp_path, capsys):
    """Nor under another name of the same file."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "hello"}) + "\n")
    (tmp_path / "link.jsonl").symlink_to(path)
    for output in (path, tmp_path / "link.jsonl", tmp_path / "." / "prompts.jsonl"):
        for form in ([], ["--format", "alpacaeval"]):
            with pytest.raises(SystemExit):
                main(["nowhere", "--prompts", str(path), "--output", str(output), *form])
            assert "is the file of --prompts" in capsys.readouterr().err
    assert json.loads(path.read_text()) == {"prompt": "hello"}


def test_the_note_on_a_prompts_end_is_for_strings_alone():
    """A chat template decides where the prompt of messages ends."""
    tokenizer = make_tokenizer()
    row = {"prompt": "Which is the best programming language? ", "chosen": "Python", "rejected": "Java"}
    assert "the first prompt ends in ' '" in boundary_note([row], tokenizer)
    messages = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    assert boundary_note([row | messages], tokenizer) is None
    assert boundary_note([row | {"prompt": "Which one?"}], tokenizer) is None
