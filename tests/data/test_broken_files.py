"""Files that people bring: each that is broken is named, with its line where it has lines, and what to do."""

import bz2
import gzip
import json
import lzma
import os
import shutil

import datasets
import pytest
from tiny import CHATML, ROWS, make_model, make_tokenizer

from orpo.data.files.file_check import MOST_LEVELS
from orpo.data.files.sources import load_pairs
from orpo.data.prepare import Limits, prepare_dataset
from orpo.data.preview import first_pair
from orpo.generate import read_prompts
from orpo.generation import load
from orpo.judges import read_questions
from orpo.merge import merge_adapter
from orpo.model.load import load_model, load_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")

ROW = json.dumps(ROWS[0])
UMLAUT = json.dumps({**ROWS[0], "chosen": "für"}, ensure_ascii=False)
PACKED = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}


def nested(levels):
    # The row itself is a level.
    return json.dumps(ROWS[0])[:-1] + ', "x": ' + "[" * (levels - 1) + "]" * (levels - 1) + "}"


def flipped(data):
    return data[:60] + bytes(byte ^ 0xFF for byte in data[60:90]) + data[90:]


def noise(packed):
    return flipped(packed(b"".join(os.urandom(8).hex().encode() for _ in range(200))))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            f"{ROW}\n{UMLAUT}\n".encode("latin-1"),
            r"is not UTF-8: line 2 has the byte 0xfc; save it as UTF-8",
        ),
        ("a.jsonl.gz", gzip.compress(f"{UMLAUT}\n".encode("cp1252"), mtime=0), "is not UTF-8: line 1"),
        ("a.csv", "prompt,chosen,rejected\na,für,c\n".encode("cp1252"), "is not UTF-8: line 2"),
        ("a.json", f"[\n{UMLAUT}\n]".encode("latin-1"), "is not UTF-8: line 2"),
        ("a.jsonl", UMLAUT.encode("utf-16"), "is not UTF-8: line 1 has the byte 0xff"),
        *((f"a.jsonl.{k}", b"no packed file at all\n", "could not be unpacked") for k in PACKED),
        *((f"a.jsonl.{k}", noise(pack), "could not be unpacked") for k, pack in PACKED.items()),
        ("a.parquet", b"no parquet" * 9, "could not be read as parquet: Parquet magic bytes not found"),
        ("a.arrow", b"no arrow" * 9, "could not be read as arrow: Not an Arrow file"),
        ("a.jsonl", b"1\n2\n", "line 1 is 1, no JSON object"),
        ("a.jsonl", f"\ufeff{ROW}\n{ROW[:-1]}\n".encode(), "line 2 is no JSON: Expecting ',' delimiter"),
        ("a.jsonl", f"{ROW}\n{nested(10_000)}\n".encode(), "line 2 is nested 10,000 levels deep, and 50 are read"),
        ("a.jsonl.xz", lzma.compress(nested(10_000).encode()), "line 1 is nested 10,000 levels deep"),
    ],
)
def test_data(name, content, message, streaming, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.* ?{message}"):
        load_pairs(str(tmp_path / name), streaming=streaming)


def test_files_of_a_folder_are_looked_at_too(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(UMLAUT.encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.jsonl is not UTF-8"):
        load_pairs(str(tmp_path))
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.parquet").write_bytes(b"no parquet" * 9)
    with pytest.raises(ValueError, match="could not be read as a data set: Parquet magic bytes"):
        load_pairs(str(tmp_path))


def test_nesting_that_is_read_and_brackets_in_text_are_no_reason(tmp_path):
    (tmp_path / "a.jsonl").write_text(nested(MOST_LEVELS) + "\n")
    assert len(load_pairs(str(tmp_path / "a.jsonl"))) == 1
    (tmp_path / "b.jsonl").write_text(json.dumps({**ROWS[0], "chosen": '\\"[{' * 999}) + "\n")
    assert len(load_pairs(str(tmp_path / "b.jsonl"))) == 1


def test_zstd_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("orpo.packages._is_installed", lambda package: package != "zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd rest")
    with pytest.raises(ImportError, match=r"a\.jsonl\.zst, compressed with zstd, needs zstandard.*: pip install"):
        load_pairs(str(tmp_path / "a.jsonl.zst"))


def test_text_of_other_commands(tmp_path):
    (tmp_path / "a.txt").write_bytes("eins\nzwölf\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8: line 2 has the byte 0xf6"):
        read_prompts(str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfeins\r\nzwei\r\n")
    assert read_prompts(str(tmp_path / "a.txt")) == ["eins", "zwei"]
    (tmp_path / "q.json").write_bytes('[{"instruction": "zwölf"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"q\.json is not UTF-8"):
        read_questions(tmp_path / "q.json", "alpacaeval")
    (tmp_path / "q.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is neither a JSON list nor a JSON object a line"):
        read_questions(tmp_path / "q.json", "alpacaeval")


PREPARED = {
    "chosen_input_ids": [5, 6, 7, 8],
    "rejected_input_ids": [5, 6, 9],
    "chosen_prompt_length": 2,
    "rejected_prompt_length": 2,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"chosen_input_ids": [5, -100, 7]},
            "row 1 cannot be trained on: chosen_input_ids holds -100; an id is 0 or m",
        ),
        ({"rejected_prompt_length": 4}, "row 1 .*: rejected_prompt_length is 4, of rejected_input_ids' 3 tokens"),
        ({"chosen_prompt_length": -1}, "row 1 .*: chosen_prompt_length is -1"),
        ({"chosen_input_ids": []}, "row 1 .*: chosen_input_ids holds no token"),
        ({"rejected_prompt_length": 3}, "row 1 .*: the rejected answer is empty, rejected_prompt_length 3 of 3 tokens"),
        ({"chosen_prompt_length": 0, "chosen_input_ids": [5]}, "row 1 .*: the chosen answer is empty, .* 0 of 1 tok"),
        ({"chosen_input_ids": [5, 6, 9]}, "row 1 .*: its two answers are equal; leave out such rows"),
        ({"length": 8}, "row 1 has the length 8, and its two sequences have 7 tokens together: leave out the column"),
        ({"chosen_input_ids": [5, None]}, "row 1 .*: chosen_input_ids or chosen_prompt_length holds null"),
        ({"rejected_prompt_length": None}, "row 1 .*: rejected_input_ids or rejected_prompt_length holds null"),
        (
            {"chosen_input_ids": [5.5, 6.0]},
            "train: chosen_input_ids holds list<.*: double>; it has to hold lists of wh",
        ),
    ],
)
def test_prepared_columns(changes, message, stream):
    first = {"chosen_input_ids": [1.0]} if "double" in message else {"length": 7} if "length" in changes else {}
    data = datasets.Dataset.from_list([{**PREPARED, **first}, {**PREPARED, **changes}])
    data = data.to_iterable_dataset() if stream else data
    with pytest.raises(ValueError, match=message):
        list(prepare_dataset(data, make_tokenizer(), Limits()))


@pytest.mark.parametrize("stream", [False, True])
def test_prepared_columns_get_their_length(stream):
    data = datasets.Dataset.from_list([PREPARED, {**PREPARED, "chosen_input_ids": [5, 6, 7]}]).select([1, 0])
    data = data.to_iterable_dataset() if stream else data
    assert [row["length"] for row in prepare_dataset(data, make_tokenizer(), Limits())] == [6, 7]


@pytest.mark.parametrize("changes", [{"length": 7}, {"chosen_input_ids": [5, 6, 9], "chosen_prompt_length": 1}])
def test_prepared_columns_that_are_right(changes):
    data = datasets.Dataset.from_list([{**PREPARED, **changes}])
    assert len(prepare_dataset(data, make_tokenizer(), Limits())) == 1


def test_a_stream_without_usable_rows():
    stream = datasets.Dataset.from_list([{**ROWS[0], "chosen": ""}] * 3).to_iterable_dataset()
    with pytest.raises(ValueError, match="no row of the stream can train: train: kept 0 of 3: 3 empty answers"):
        first_pair(prepare_dataset(stream, make_tokenizer(), Limits()))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m",
            r"row 0: row that the chat template refuses: .* \(line 1 of the template\)",
        ),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
    ],
)
def test_chat_templates(template, message):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    talk = {side: [{"role": "user", "content": "a"}, {"role": "assistant", "content": side}] for side in
            ("chosen", "rejected")}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        prepare_dataset([talk], tokenizer, Limits())


def test_messages_with_other_keys_and_keywords_that_are_none():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    talk = {side: [{"from": "gpt", "value": side}] for side in ("chosen", "rejected")}
    with pytest.raises(
        ValueError, match=r"a message holds \['from', 'value'\], and needs 'role', a string, and 'content'"
    ):
        prepare_dataset([{"prompt": "a", **talk}], tokenizer, Limits())
    talk = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    with pytest.raises(ValueError, match="'chat_template_kwargs' has to be a dictionary, not str"):
        prepare_dataset([{"prompt": "a", **talk, "chat_template_kwargs": "x"}], tokenizer, Limits())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("models")
    make_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    lora = get_peft_model(load_model(str(folder / "model")), LoraConfig(task_type="CAUSAL_LM", r=2))
    lora.save_pretrained(folder / "adapter")
    make_tokenizer().save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize(
    ("kind", "file", "content", "message"),
    [
        ("model", "tokenizer.json", "{ broken", r"cannot be loaded: tokenizer\.json is no JSON: .* line 1 column 3"),
        ("model", "tokenizer.json", '{"version": "1.0"}', "cannot be loaded: "),
        ("model", "tokenizer_config.json", "{", r"cannot be loaded: tokenizer_config\.json is no JSON"),
        ("model", "model.safetensors", "broken weights", "cannot be loaded: SafetensorError"),
        ("adapter", "adapter_config.json", "{ broken", r"cannot be loaded: adapter_config\.json is no JSON"),
        ("adapter", "adapter_config.json", "[]", "cannot be loaded: "),
        ("adapter", "adapter_model.safetensors", "broken weights", "cannot be loaded: SafetensorError"),
    ],
)
def test_files_of_a_model(kind, file, content, message, folders, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folders / kind, broken)
    (broken / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(str(broken), device="cpu")
    if kind == "adapter":
        with pytest.raises(ValueError, match=message):
            merge_adapter(broken, tmp_path / "merged")
    elif file.startswith("tokenizer"):
        with pytest.raises(ValueError, match=message):
            load_tokenizer(str(broken))


def test_a_file_in_place_of_the_merged_folder(folders, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="which is a file: name a folder"):
        merge_adapter(folders / "adapter", tmp_path / "file")
    with pytest.raises(ValueError, match="dtype is 'float7'; it has to be 'auto' or a torch dtype"):
        merge_adapter(folders / "adapter", tmp_path / "merged", dtype="float7")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("banana", "device is 'banana', which torch does not know"),
        ("cuda:99", "device is 'cuda:99', and torch finds the CPU"),
        ("meta", "device is 'meta', and torch finds the CPU"),
    ],
)
def test_devices_that_are_not_here(device, message, folders):
    with pytest.raises(ValueError, match=message):
        load(str(folders / "model"), device=device)
