"""Names and texts of others are shown, and are no markup of the card."""

import peft
import pytest
from markdown_it import MarkdownIt
from tiny import SEVEN, make_model
from trainers import make_trainer

from orpo.report.markdown import code, table, text

HOSTILE = (
    "<script>alert(1)</script>",
    "a\n\n# Heading\n\n* item",
    "[link](http://x) ![image](http://x)",
    "``a` b`",
    "`",
    "a | b",
    "**bold** ~~gone~~ \\* &lt;b&gt;",
    "# x",
    "> quote",
    "a\r\nb\u2028c\x00",
)
PAGE = MarkdownIt("commonmark").enable("table").enable("strikethrough")


def kinds(page):
    """Kinds of tokens that a page has, and all its text."""
    tokens = [child for token in PAGE.parse(page) for child in (token, *(token.children or ()))]
    return {token.type for token in tokens}, "".join(t.content for t in tokens if t.type in ("text", "code_inline"))


@pytest.mark.parametrize("value", HOSTILE)
def test_any_text_shows_itself(value):
    shown = " ".join("".join(c if c.isprintable() else " " for c in value).split())
    plain, paragraph = kinds("* a b"), {"paragraph_open", "paragraph_close", "inline"}
    found, words = kinds(f"* {text(value)}")
    assert found - {"text_special"} == plain[0] and "".join(words.split()) == "".join(shown.split())
    found, words = kinds(f"x {code(value)} y")
    assert found == paragraph | {"text", "code_inline"}
    assert words == f"x {shown} y"
    found, words = kinds(table(("a", "b"), [(value, value)]))
    assert found == kinds(table(("a", "b"), [("c", "d")]))[0] | (found & {"text_special"})
    assert "".join(words.split()) == "ab" + 2 * "".join(shown.split())


def test_a_card_is_no_place_for_markup_of_others(tmp_path):
    base = tmp_path / "<script>x"
    make_model("llama").save_pretrained(base)
    (base / "README.md").write_text('---\nbase_model: "a`\\n\\n# Injected\\n\\n<script>"\nlicense: mit\n---\n')
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path / "out", model=str(base), eval_dataset={"# a\n\n# <b>": SEVEN}, peft_config=config)
    trainer.evaluate()
    trainer.create_model_card(dataset="/data/`<script>`.jsonl", dataset_args="x\n\n# y", model_name="a\n# <script>b")
    page = (tmp_path / "out" / "README.md").read_text().partition("\n---\n")[2]
    tokens = PAGE.parse(page)
    assert not {"html_block"} & {token.type for token in tokens}
    assert not [child for token in tokens for child in token.children or () if child.type == "html_inline"]
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    known = ["Data", "Loss", "Settings", "Held-out pairs", "Versions", "Citation"]
    assert headings[1:] == known and "<script>" not in headings[0]
