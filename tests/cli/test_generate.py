"""What is continued, how batches are filled up, when an answer ends; orpo.generate, the command."""

import json
import pickle
import shutil

import peft
import pytest
import torch
from chat_templates import family_tokenizer
from tiny import CHATML, SMALL, make_model, make_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaModel

from orpo.data.forms.formats import pair_text
from orpo.generate import main, read_prompts
from orpo.generation import generate, load
from orpo.rendering import render

PROMPTS = ["hello", "how are you, my dear friend", "What is your name?", "hello hello hello hello"]


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


@pytest.fixture
def folder(tmp_path, model):
    model.save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def greedy(model, ids, steps, ends):
    """Token by token, without cache, batch or padding."""
    ids = list(ids)
    start = len(ids)
    for _ in range(steps):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[start:]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_cpu_that_emulates_bfloat16_generates_in_float32_unless_told_otherwise(dtype, tmp_path, bfloat16_cpu):
    make_model("llama").bfloat16().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    loaded, _ = load(str(tmp_path), dtype=dtype, device="cpu")
    assert loaded.dtype == (torch.float32 if dtype == "auto" and not bfloat16_cpu else torch.bfloat16)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_greedy_answers_are_the_most_likely_tokens(batch_size, model):
    tokenizer = make_tokenizer()
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=7, batch_size=batch_size)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        expected = greedy(model, ids, 7, {tokenizer.eos_token_id})
        assert answer == tokenizer.decode(expected, skip_special_tokens=True)


def test_an_answer_ends_at_either_end_token(model):
    tokenizer = make_tokenizer()
    ids = [tokenizer.bos_token_id, *tokenizer("hello", add_special_tokens=False)["input_ids"]]
    tokens = greedy(model, ids, 5, set())
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [tokens[2]]
    try:
        (answer,) = generate(model, tokenizer, ["hello"], max_new_tokens=5)
    finally:
        model.generation_config.eos_token_id = before
    first = tokens.index(tokens[2])
    assert answer == tokenizer.decode(tokens[: first + 1], skip_special_tokens=True)


def test_an_answer_knows_whether_it_ended(model):
    tokenizer = make_tokenizer()
    ids = [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in PROMPTS]
    tokens = greedy(model, ids[0], 5, {tokenizer.eos_token_id})
    assert len(tokens) == 5 and tokenizer.eos_token_id not in tokens
    (cut,) = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=5)
    assert cut.cut and cut.strip().cut and pickle.loads(pickle.dumps(cut)).cut
    assert json.dumps(cut) == json.dumps(str(cut)) and type(str(cut)) is str
    # The same tokens, of which the last one now ends the answer: as long as the limit, and not cut.
    end, before = tokens[-1], model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [end]
    try:
        answers = generate(model, tokenizer, PROMPTS, max_new_tokens=5)
    finally:
        model.generation_config.eos_token_id = before
    expected = [end not in greedy(model, row, 5, {end, tokenizer.eos_token_id}) for row in ids]
    assert [answer.cut for answer in answers] == expected and not answers[0].cut and any(expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapter"])
def test_the_models_own_generation_settings_do_not_act(adapted, temperature):
    model, settings = make_model("llama"), dict(max_new_tokens=6, temperature=temperature)
    whole = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")) if adapted else model
    plain = generate(whole, make_tokenizer(), PROMPTS, **settings)
    own = GenerationConfig(repetition_penalty=50.0, top_k=1, num_beams=2, eos_token_id=2)
    model.generation_config = whole.generation_config = own
    assert generate(whole, make_tokenizer(), PROMPTS, **settings) == plain
    assert model.generation_config is own and whole.generation_config is own


def test_seeds_repeat_and_leave_the_random_state_alone(model):
    tokenizer = make_tokenizer()
    settings = dict(max_new_tokens=12, temperature=1.0)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one = generate(model, tokenizer, PROMPTS, seed=1, **settings)
    assert torch.rand(1) == expected
    assert one == generate(model, tokenizer, PROMPTS, seed=1, **settings)
    assert one != generate(model, tokenizer, PROMPTS, seed=2, **settings)


def test_a_small_top_p_is_greedy(model):
    tokenizer = make_tokenizer()
    sampled = generate(model, tokenizer, PROMPTS, max_new_tokens=6, temperature=1.0, top_p=1e-6)
    assert sampled == generate(model, tokenizer, PROMPTS, max_new_tokens=6)


def test_training_goes_on_in_training_mode(model):
    model.train()
    try:
        generate(model, make_tokenizer(), ["hello"], max_new_tokens=1)
        assert model.training
    finally:
        model.eval()


def test_chat_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    turn = render("hello", tokenizer)
    assert turn == render([{"role": "user", "content": "hello"}], tokenizer) and turn != "hello"
    assert turn.endswith("assistant\n")
    assert render("hello", tokenizer, chat_template=False) == "hello"
    assert "be kind" in render("hello", tokenizer, system="be kind")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1e-300}, "temperature is 1e-300"),
        ({"temperature": 9e-7}, "temperature is 9e-07"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"chat_template": True}, "no chat template"),
        ({"system": "be kind"}, "system is given"),
    ],
)
def test_refusals(settings, words, model):
    with pytest.raises(ValueError, match=words):
        generate(model, make_tokenizer(), ["hello"], **settings)


def test_the_least_temperature_is_nearly_none(model):
    prompts, tokenizer = ["hello", "how are you"], make_tokenizer()
    options = {"max_new_tokens": 8, "chat_template": False}
    assert generate(model, tokenizer, prompts, temperature=1e-6, **options) == generate(
        model, tokenizer, prompts, **options
    )


def test_a_prompt_without_a_token_is_refused(model):
    with pytest.raises(ValueError, match="has no token"):
        generate(model, make_tokenizer(bos_token=None), [""])


def test_prompts_from_files(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert read_prompts(str(tmp_path / "p.txt")) == ["one", "two"]
    messages = [{"role": "user", "content": "one"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": messages}) + "\n")
    assert read_prompts(str(tmp_path / "p.jsonl")) == [messages]
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "one"}) + "\n")
    with pytest.raises(ValueError, match="'prompt'"):
        read_prompts(str(tmp_path / "q.jsonl"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(str(tmp_path / "empty.txt"))


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps(TOOL), [{**TOOL, "x": None}]])
def test_a_prompt_with_tools_is_rendered_as_in_training(tools):
    tokenizer = family_tokenizer("Qwen 2.5")
    arguments = {"city": "Paris", "none": None}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    prompt = [{"role": "user", "content": "Paris?", "weight": 1}, call, {"role": "tool", "content": "18 C"}]
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    trained = pair_text({"prompt": prompt, **answers, "tools": tools}, tokenizer).chosen_prompt
    assert render(prompt, tokenizer, tools=tools) == trained
    assert '"arguments": {"city": "Paris"}}' in trained and f"<tools>\n{json.dumps(TOOL)}\n</tools>" in trained
    # Of no tools, no list of them.
    assert "<tools>" not in render("hello", tokenizer, tools=[])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chat_template": False, "tools": [[TOOL]]}, "tools is given, but a prompt without a chat template"),
        ({"tools": [None, [TOOL]]}, "tools has 2 entries for 1 prompts"),
        ({"chat_template": True, "tools": ["{"]}, "'tools' holds '{', which is no JSON"),
    ],
)
def test_tools_without_a_place_are_refused(settings, words, model):
    with pytest.raises(ValueError, match=words):
        generate(model, make_tokenizer(), ["hello"], **settings)


def test_the_command_reads_messages_and_tools(folder, tmp_path, capsys):
    saved, out = tmp_path / "chat", tmp_path / "answers.jsonl"
    shutil.copytree(folder, saved)
    family_tokenizer("Hermes").save_pretrained(saved)
    talk = [{"role": "user", "content": "Paris?"}]
    rows = [{"messages": talk, "tools": [TOOL]}, {"messages": talk, "tools": None}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = [str(saved), "--device", "cpu", "--max_new_tokens", "8"]
    main([*line, "--prompts", str(tmp_path / "p.jsonl"), "--output", str(out)])
    records = [json.loads(text) for text in out.read_text().splitlines()]
    model, tokenizer = load(str(saved), device="cpu")
    assert [r["answer"] for r in records] == [
        generate(model, tokenizer, [talk], tools=[own], max_new_tokens=8)[0] for own in ([TOOL], None)
    ]
    assert records[0]["answer"] != records[1]["answer"]
    assert records[0]["prompt"] == talk and records[0]["tools"] == [TOOL] and "tools" not in records[1]
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "hello", "tools": "[{"}) + "\n")
    with pytest.raises(ValueError, match=r"q\.jsonl, row 0, counted from 0: 'tools' holds"):
        read_prompts(str(tmp_path / "q.jsonl"))


def test_the_command_writes_prompt_and_answer(folder, tmp_path, model, capsys):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    out = tmp_path / "answers.jsonl"
    line = [str(folder), "--device", "cpu", "--max_new_tokens", "5"]
    main([*line, "--prompts", str(tmp_path / "p.txt"), "--output", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    expected = generate(model, make_tokenizer(), PROMPTS, max_new_tokens=5)
    assert [(r["prompt"], r["answer"]) for r in records] == list(zip(PROMPTS, expected, strict=True))
    assert records[0]["temperature"] == 0.0 and records[0]["model"] == str(folder)
    capsys.readouterr()
    main([*line, "--prompt", PROMPTS[0]])
    assert capsys.readouterr().out == expected[0] + "\n"


def test_the_command_says_how_many_answers_did_not_end(folder, tmp_path, model, capsys):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    cut = sum(answer.cut for answer in generate(model, make_tokenizer(), PROMPTS, max_new_tokens=3))
    assert cut > 0
    line = [str(folder), "--device", "cpu", "--prompts", str(tmp_path / "p.txt"), "--max_new_tokens", "3"]
    for output in ([], ["--output", str(tmp_path / "answers.jsonl")]):
        main([*line, *output])
        assert (
            f"{cut} of 4 answers reached --max_new_tokens (3) or the model's last position\n" in capsys.readouterr().err
        )
    # Where every token ends an answer, none is cut.
    model.generation_config.eos_token_id = list(range(model.config.vocab_size))
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config.eos_token_id = make_tokenizer().eos_token_id
    main(line)
    assert "reached" not in capsys.readouterr().err


def test_an_adapters_folder_answers_as_the_adapted_model(folder, tmp_path):
    model, tokenizer = load(str(folder), device="cpu")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.eval()
    expected = generate(adapted, tokenizer, PROMPTS, max_new_tokens=5)
    adapted.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    again, _ = load(str(tmp_path / "a"), device="cpu")
    assert generate(again, tokenizer, PROMPTS, max_new_tokens=5) == expected
    assert expected != generate(load(str(folder), device="cpu")[0], tokenizer, PROMPTS, max_new_tokens=5)


def test_an_output_that_cannot_be_written_is_said_before_the_work(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(folder), "--prompt", "hello", "--output", str(tmp_path / "nowhere" / "answers.jsonl")])
    assert "in a folder that does not exist" in capsys.readouterr().err


def test_a_mistake_on_the_line_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["out"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said == (
        "orpo-generate: one of the arguments --prompt --prompts is required; options: orpo-generate --help\n"
    )


def test_a_model_without_its_head_is_refused(tmp_path):
    LlamaModel(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model without its head"):
        load(str(tmp_path))


def test_a_missing_folder_is_named():
    with pytest.raises(ValueError, match=r"no folder \./nowhere"):
        load("./nowhere")


def test_an_answer_ends_with_the_models_positions():
    """OPT has an embedding for each, and none beyond."""
    tokenizer = make_tokenizer()
    prompt = [tokenizer.bos_token_id, *tokenizer("hello", add_special_tokens=False)["input_ids"]]
    model = make_model("opt", max_position_embeddings=len(prompt) + 3)
    (answer,) = generate(model, tokenizer, ["hello"], max_new_tokens=50)
    assert answer.cut or len(tokenizer(str(answer))["input_ids"]) < 50
    with pytest.raises(ValueError, match=rf"a prompt has \d+ tokens, and the model {len(prompt) + 3} positions"):
        generate(model, tokenizer, ["hello", "hello hello hello hello hello"], max_new_tokens=1)


def test_lines_end_where_lines_end(tmp_path):
    """str.splitlines also ends them at characters that texts hold."""
    (tmp_path / "prompts.txt").write_text("one\u2028still one\n\ntwo\x85still two\n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["one\u2028still one", "two\x85still two"]


def test_a_folder_is_no_output(folder, capsys):
    with pytest.raises(SystemExit):
        main([str(folder), "--prompt", "hello", "--output", str(folder)])
    assert "which is a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            ["--temperature", "nan"],
            "--temperature is nan; it has to be 0 (the most likely token), or at least 1e-06 and finite",
        ),
        (["--temperature", "inf"], "--temperature is inf"),
        (["--temperature", "1e-300"], "--temperature is 1e-300"),
        (["--top_p", "-1"], "--top_p is -1.0; it has to be above 0 and at most 1"),
        (["--top_p", "nan"], "--top_p is nan"),
    ],
)
def test_what_cannot_be_sampled_by_is_said_before_the_model_is_loaded(option, said, capsys):
    with pytest.raises(SystemExit):
        main(["no-model", "--prompt", "hello", *option])
    assert said in capsys.readouterr().err


def test_seeds_and_temperatures_that_torch_would_misread(model):
    with pytest.raises(
        ValueError, match=r"temperature is nan; it has to be 0 \(the most likely token\), or at least 1e-06"
    ):
        generate(model, make_tokenizer(), ["hello"], temperature=float("nan"))
    with pytest.raises(ValueError, match="seed is -1; it has to be 0 or more"):
        generate(model, make_tokenizer(), ["hello"], seed=-1)


def test_messages_are_read_as_in_training():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    opening = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    assert render(parts, tokenizer) == opening
    begun = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    assert render(begun, tokenizer) == f"{opening}hi"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"from": "human", "value": "a"}], "'from' and 'value' have to be renamed"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a part of type 'image'"),
        (None, "a string or a list of messages, not None"),
        (7, "a string or a list of messages, not 7"),
        ([], "a string or a list of messages, not \\[\\]"),
        ([{"role": "system", "content": "a"}], "the chat template refuses a prompt: no system here"),
    ],
)
def test_prompts_that_cannot_be_rendered_are_refused(prompt, message):
    tokenizer = make_tokenizer()
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    tokenizer.chat_template = refusal + CHATML
    with pytest.raises(ValueError, match=message):
        render(prompt, tokenizer)


def test_answers_do_not_go_into_the_folder_of_the_prompts(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}')
    for name in ("train.jsonl", "answers.jsonl"):
        with pytest.raises(SystemExit):
            main(["m", "--prompts", str(tmp_path), "--output", str(tmp_path / name)])
        assert "in the folder of --prompts: name a file elsewhere" in capsys.readouterr().err
