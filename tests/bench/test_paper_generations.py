"""benchmarks.paper, second part: reward model, win rates, diversity, DPO, and the page made of the stored results."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from tiny import CHATML, ROWS, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from benchmarks.paper import diversity, generations, methods, policies, reward, rlhf, winrates
from orpo.data.forms.formats import pair_text
from orpo.data.prepare import Limits, prepare_dataset

PAPER = Path(generations.__file__).parent


def known(texts):
    """An embedder of three directions: a and b are orthogonal, c lies between, -a is opposite; lengths do not count."""
    directions = {"a": (2.0, 0.0), "b": (0.0, 3.0), "c": (1.0, 1.0), "-a": (-1.0, 0.0)}
    return torch.tensor([directions[text] for text in texts])


def test_mean_cosine_of_known_directions():
    assert diversity.mean_cosine(known(["a", "a"])) == pytest.approx(1)
    assert diversity.mean_cosine(known(["a", "-a"])) == pytest.approx(-1)
    assert diversity.mean_cosine(known(["a", "b", "c"])) == pytest.approx(2 * math.sqrt(0.5) / 3)
    for rows, words in (("a", "1 rows"), ("", "0 rows")):
        with pytest.raises(ValueError, match=words):
            diversity.mean_cosine(known(list(rows)))
    with pytest.raises(ValueError, match="1 rows of zeros"):
        diversity.mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def test_diversity_per_input_and_across_inputs():
    # Two prompts, two answers each: alike at the first, orthogonal at the second; first answers opposite.
    per_input, across = diversity.diversity([["a", "-a"], ["a", "b"]], known)
    assert per_input == pytest.approx((1 + 0) / 2) and across == pytest.approx(-1)


def test_an_encoders_embedding_is_the_mean_over_a_texts_own_tokens(encoder):
    embed = diversity.load_embedder(encoder)
    alone, padded = embed(["hello"]), embed(["hello", "hello how are you my dear friend"])
    torch.testing.assert_close(alone[0], padded[0], rtol=1e-4, atol=1e-5)
    assert diversity.mean_cosine(padded) < 0.999


def test_minilm_knows_what_is_alike():
    try:
        embed = diversity.load_embedder(diversity.find_minilm())
    except ImportError as error:
        pytest.skip(str(error))
    cat, kitten, oil = embed(["A cat sat on the mat.", "The kitten sits on a rug.", "Crude oil prices fell."])
    alike, apart = (diversity.mean_cosine(torch.stack([cat, other])) for other in (kitten, oil))
    assert alike > 0.5 > 0.2 > apart


def test_eq_11_is_minus_log_sigmoid_of_the_difference():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    expected = -(math.log(1 / (1 + math.exp(-0.5))) + math.log(1 / (1 + math.exp(3)))) / 2
    assert reward.preference_loss(chosen, rejected).item() == pytest.approx(expected)


@pytest.fixture
def language_model(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    return str(tmp_path / "lm")


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def test_a_reward_model_learns_pairs_and_reads_the_end_of_each_text(language_model):
    tokenizer = make_tokenizer()
    model, pairs = reward.load_reward(language_model, tokenizer), reward.pair_texts(ROWS, tokenizer)
    assert len(pairs) == len(ROWS) and all(text.endswith("</s>") for pair in pairs for text in pair)
    texts = [text for pair in pairs for text in pair]
    alone = [reward.score(model, tokenizer, [text]).item() for text in texts]
    torch.testing.assert_close(torch.tensor(alone), reward.score(model, tokenizer, texts), rtol=1e-4, atol=1e-5)
    losses = reward.fit(model, tokenizer, pairs[:4], learning_rate=3e-3, epochs=20, batch_size=4)
    assert losses[0] > 0.3 and losses[-1] < 0.2
    assert reward.accuracy(model, tokenizer, pairs[:4]) == 1
    # Turned round, every pair is wrong.
    assert reward.accuracy(model, tokenizer, [(b, a) for a, b in pairs[:4]]) == 0


def test_texts_end_alike_whoever_wrote_them():
    tokenizer = make_tokenizer(chat_template=CHATML, additional_special_tokens=["<|im_end|>"])
    for text in ("hello", "hello</s>", "hello<|im_end|>\n", "hello \n"):
        assert reward.ended(text, tokenizer) == "hello</s>"


def test_win_rates_count_a_tie_half_and_spread_over_three_rounds():
    assert winrates.win_rate([1, 2, 3, 4], [0, 2, 4, 1]) == 62.5
    ours, theirs = [[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], [[0.5, 0.5]] * 4
    records = [{"seed": 3, "model": "orpo", "rewards": ours}, {"seed": 3, "model": "sft", "rewards": theirs}]
    mean, spread = winrates.win_rates(records, "orpo", "sft")[3]
    assert mean == pytest.approx(250 / 3) and spread == pytest.approx(50 / math.sqrt(3))


def test_a_cut_answer_can_be_counted_as_lost():
    records = [
        {"seed": 0, "model": "orpo", "rewards": [[1.0, 0.0, 1.0, 2.0]], "cut": [[0, 0, 1, 1]]},
        {"seed": 0, "model": "dpo", "rewards": [[0.0, 1.0, 0.0, 3.0]], "cut": [[0, 1, 0, 1]]},
    ]
    assert winrates.win_rates(records, "orpo", "dpo")[0][0] == 50
    # Won, won by the other's end, lost by its own, and neither ended.
    assert winrates.win_rates(records, "orpo", "dpo", cut_loses=True)[0][0] == 100 * (1 + 1 + 0 + 0.5) / 4


@pytest.mark.parametrize("template", [None, CHATML])
def test_models_of_ones_own_are_sampled_from_the_prompts_of_training(
    template, language_model, tmp_path, monkeypatch, capsys
):
    tokenizer = make_tokenizer(chat_template=template)
    tokenizer.save_pretrained(language_model)
    talks = [
        {side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
         for side in ("chosen", "rejected")}
        for row in ROWS
    ]  # fmt: skip
    rows = talks if template else ROWS
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples = prepare_dataset(rows, tokenizer, Limits(max_length=256), report=lambda _: None).to_list()
    trained = [e["chosen_input_ids"][: e["chosen_prompt_length"]] for e in examples]
    asked, sampled = [], winrates.answer_tokens

    def spy(model, tokenizer, ids, **settings):
        asked.append(ids)
        return sampled(model, tokenizer, ids, **settings)

    monkeypatch.setattr(winrates, "answer_tokens", spy)
    own = ["--models", f"orpo={language_model}", "--reward", language_model, "--data", str(tmp_path / "pairs.jsonl")]
    own += ["--split", "train", "--output", str(tmp_path / "own.jsonl"), "--rounds", "2", "--max_new_tokens", "3"]
    winrates.main([*own, "--max_length", "4"])
    assert asked == [trained, trained]
    (record,) = winrates.read(tmp_path / "own.jsonl")
    cut = sum(map(sum, record["cut"]))
    said = capsys.readouterr().out
    assert cut > 0 and f"orpo: {cut} of 14 answers reached --max_new_tokens (3)" in said
    assert f"the last 4 tokens (--max_length) of {record['longer']} texts that are longer" in said
    # The judge's head is random, by its seed; what it reads are the last tokens.
    judge = reward.load_reward(language_model, tokenizer)
    texts = winrates.judged_texts(
        tokenizer, [pair_text(row, tokenizer).chosen_prompt for row in rows], record["answers"]
    )
    assert winrates.judge(judge, tokenizer, texts, 4) == record["rewards"] != winrates.judge(judge, tokenizer, texts)
    assert record["longer"] == sum(len(reward.token_ids(text, tokenizer)) > 4 for row in texts for text in row) > 0


def test_the_manner_of_an_answer():
    assert winrates.manner(" Not you again. The lamp costs six euros. Now go away.") == 0
    assert winrates.manner(" Great choice! The lamp costs six euros. Take care!") == 4.5
    assert winrates.manner(" The lamp costs six euros.") is None


def test_dpo_starts_at_log_2_and_its_sums_are_the_models_own():
    model, tokenizer = make_model("llama"), make_tokenizer()
    examples = prepare_dataset(ROWS, tokenizer, Limits(max_length=64), report=lambda _: None).to_list()
    sums = methods.reference_sums(model, methods.layout_of("dpo", tokenizer.pad_token_id)(examples)).view(2, -1)
    for i, row in enumerate(ROWS):
        for found, side in zip(sums[:, i], ("chosen", "rejected"), strict=True):
            start = tokenizer(row["prompt"])["input_ids"]
            end = tokenizer(row[side], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[tokenizer.bos_token_id, *start, *end, tokenizer.eos_token_id]])
            with torch.no_grad():
                logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            assert found.item() == pytest.approx(logp[len(start) :].sum().item(), rel=1e-4)
    settings = policies.DPOSettings(learning_rate=1e-3, steps=20, batch_size=7)
    losses = policies.train_dpo(model, tokenizer, ROWS, settings, seed=0)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-4) and losses[-1] < 0.6


def test_quick_runs_end_to_end(tmp_path, encoder):
    answers, embedded = tmp_path / "answers.jsonl", tmp_path / "diversity.jsonl"
    quick = ["--quick", "--seeds", "1", "--rounds", "2", "--output", str(answers), "--folder", str(tmp_path / "models")]
    winrates.main(quick)
    diversity.main(["--answers", str(answers), "--embedder", encoder, "--output", str(embedded)])
    records, similar = winrates.read(answers), winrates.read(embedded)
    assert [r["model"] for r in records] == [r["model"] for r in similar] == list(policies.NAMES)
    assert all(len(r["rewards"]) == 2 and len(r["rewards"][0]) == 4 == len(r["answers"][1]) for r in records)
    blocks = generations.blocks(records, similar, records)
    assert "ORPO vs SFT" in blocks["win rates"] and len(blocks["diversity"].splitlines()) == 6
    (ppo_record,) = (r for r in records if r["model"] == "ppo")
    first, last = ppo_record["history"]
    assert ppo_record["ppo"]["batches"] == 2 and first["kl"] == 0
    cells = f"{first['score']:.1f} | {first['length']:.1f} | {last['score']:.1f} | {last['length']:.1f}"
    assert blocks["ppo"].splitlines()[-1].startswith(f"| 1 | {cells} |")
    generations.draw(records, tmp_path / "figure.png")
    # The same models again, as somebody's own.
    own = ["--models", *(f"{name}={tmp_path}/models/seed-1/{name}" for name in ("sft", "orpo"))]
    rows = tmp_path / "models" / "pairs.jsonl"
    rows.write_text('{"prompt": "Customer: hello\\nDesk:", "chosen": " yes", "rejected": " no"}\n')
    own += ["--reward", str(tmp_path / "models" / "seed-1" / "before"), "--data", str(rows), "--split", "train"]
    winrates.main([*own, "--output", str(tmp_path / "own.jsonl"), "--rounds", "2", "--max_new_tokens", "4"])
    assert [r["model"] for r in winrates.read(tmp_path / "own.jsonl")] == ["sft", "orpo"]


def test_rlhf_of_a_model_of_ones_own(language_model, tmp_path, capsys):
    """A pass over the prompts, batch by batch, from a folder into a folder; settings are those of the line."""
    make_tokenizer().save_pretrained(language_model)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    line = [language_model, "--reward", language_model, "--data", str(data), "--output", str(tmp_path / "ppo")]
    line += ["--batch_size", "2", "--mini_batch_size", "1", "--epochs", "1", "--max_new_tokens", "3"]
    rlhf.main([*line, "--learning_rate", "1e-2"])
    history = [json.loads(text) for text in (tmp_path / "ppo" / "history.jsonl").read_text().splitlines()]
    assert len(history) == len(ROWS) // 2 and history[0]["kl"] == 0 < abs(history[-1]["kl"])
    assert history[0]["kl_coefficient"] == 0.1 and all(1 <= h["length"] <= 3 for h in history)
    assert f"{len(ROWS)} prompts, {len(history)} batches" in capsys.readouterr().out
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (language_model, tmp_path / "ppo"))
    assert any((a != b).any() for a, b in zip(before.parameters(), after.parameters(), strict=True))
    scaled = make_model("cohere", logit_scale=3.0)
    with pytest.raises(ValueError, match="nats off the model's own"):
        rlhf.refuse_other_logits(scaled, make_tokenizer(), [1, 5, 6])
    rlhf.main([*line, "--learning_rate", "0", "--batches", "1", "--seed", "3"])
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), kept.parameters(), strict=True))


def test_what_is_no_result_is_not_stored_as_one(capsys):
    for arguments, words in ((["--quick"], "no result"), (["--models", "a=b"], "--models needs")):
        with pytest.raises(SystemExit):
            winrates.main(arguments)
        assert words in capsys.readouterr().err


def test_the_page_and_its_picture_are_made_of_the_stored_results():
    from PIL import Image

    stored = winrates.read(), winrates.read(diversity.RESULTS), winrates.read(winrates.SLOW_RESULTS)
    stored = (*stored, winrates.read(diversity.SLOW_RESULTS))
    page = (PAPER / "generations.md").read_text()
    assert page == generations.with_blocks(page, generations.blocks(*stored))
    picture = Image.open(PAPER / "results" / "rewards.png")
    assert picture.info["Description"] == generations.fingerprint(stored[0])


def test_the_pages_commands_name_what_there_is():
    from orpo.recipes import recipe_names

    page = (PAPER / "generations.md").read_text()
    named = re.findall(r"--config ([\w.-]+)", (PAPER / "tables.md").read_text())
    assert named and set(named) <= set(recipe_names())
    for module in re.findall(r"python -m benchmarks\.paper\.(\w+)", page):
        assert (PAPER / f"{module}.py").exists()
