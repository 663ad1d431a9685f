"""What the tests of the commands start from."""

import json

import pytest
from tiny import ROWS, make_model, make_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a tiny model and its tokenizer in ``model``, and ``pairs.jsonl``."""
    folder = tmp_path_factory.mktemp("files")
    make_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder
