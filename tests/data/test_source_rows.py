"""What the rows of a file mean is read off the file, and not guessed at."""

import csv
import gzip
import json
import warnings

import pytest
from tiny import make_tokenizer

from orpo.data.files.sources import load_pairs
from orpo.data.prepare import Limits, prepare_dataset
from orpo.generate import read_prompts

pytestmark = pytest.mark.usefixtures("own_cache")

CSV = """prompt,chosen,rejected,score
Is it there?,NA,None,1
None,null,nan,
007,1.50,true,2
,N/A,\t,3
"""
READ = [
    {"prompt": "Is it there?", "chosen": "NA", "rejected": "None", "score": "1"},
    {"prompt": "None", "chosen": "null", "rejected": "nan", "score": ""},
    {"prompt": "007", "chosen": "1.50", "rejected": "true", "score": "2"},
    {"prompt": "", "chosen": "N/A", "rejected": "\t", "score": "3"},
]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_column_of_csv_is_text(streaming, tmp_path):
    (tmp_path / "pairs.csv").write_text(CSV)
    with gzip.open(tmp_path / "packed.csv.gz", "wt") as file:
        file.write(CSV)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.csv").write_text(CSV)
    for source in (tmp_path / "pairs.csv", tmp_path / "packed.csv.gz", folder):
        assert list(load_pairs(str(source), streaming=streaming)) == READ


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("rows", ["hi, there,b,c\nd,e,f\n", "1,a,b,c\n2,d,e,f\n", "a,b,c,\n"])
def test_csv_with_more_fields_than_names_is_refused(rows, streaming, tmp_path):
    (tmp_path / "pairs.csv").write_text(f"prompt,chosen,rejected\n{rows}")
    with pytest.raises(ValueError, match=r"the first row of pairs\.csv has more fields than its line of names"):
        load_pairs(str(tmp_path / "pairs.csv"), streaming=streaming)


def test_csv_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "pairs.csv").write_bytes("prompt,chosen,réjected\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"pairs\.csv is not UTF-8: line 1"):
        load_pairs(str(tmp_path / "pairs.csv"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_is_there_is_no_pattern(streaming, tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for name, prompt in (("gx[0-2].jsonl", "brackets"), ("gx0.jsonl", "zero"), ("what?.jsonl", "mark")):
        (tmp_path / name).write_text(json.dumps({**row, "prompt": prompt}))
    (tmp_path / "[a].csv").write_text("prompt,chosen,rejected\ncsv,b,c\n")
    for name, prompt in (("gx[0-2].jsonl", "brackets"), ("what?.jsonl", "mark"), ("[a].csv", "csv")):
        assert [r["prompt"] for r in load_pairs(str(tmp_path / name), streaming=streaming)] == [prompt]


def test_a_folder_that_is_a_pattern_is_refused(tmp_path):
    folder = tmp_path / "v[0-2]"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}')
    with pytest.raises(ValueError, match="would be read as a pattern: rename it"):
        load_pairs(str(folder))
    assert len(load_pairs(str(folder / "train.jsonl"))) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_text_that_the_reader_made_dates_of_is_refused(streaming, tmp_path):
    rows = [{"prompt": "2024-01-01", "chosen": "2024-01-01", "rejected": f"2024-01-0{i} 10:00"} for i in (2, 3)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_pairs(str(path), streaming=streaming)
    if streaming:
        # Not read by that reader.
        assert list(data) == rows and len(list(prepare_dataset(data, make_tokenizer(), Limits()))) == 2
    else:
        with pytest.raises(ValueError, match=r"holds datetime.*: save the rows as parquet or CSV"):
            prepare_dataset(data, make_tokenizer(), Limits())
    with pytest.raises(ValueError, match=r"pairs\.jsonl, row 0, counted from 0: a row holds datetime"):
        read_prompts(str(path))


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_in_a_column_of_text_are_refused(streaming, tmp_path):
    talk = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}] for answer in ("a", "b")]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "chosen", "rejected"), ("p", "q", "r"), ("hi", *map(json.dumps, talk))])
    with pytest.raises(ValueError, match="a text is messages written out") as caught:
        data = load_pairs(str(tmp_path / "pairs.csv"), streaming=streaming)
        list(prepare_dataset(data, make_tokenizer(), Limits()))
    assert caught.value.__notes__ == ["in row 1, counted from 0"]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": json.dumps(talk[0][:1])}))
    with pytest.raises(ValueError, match=r"prompts\.jsonl, row 0, counted from 0: a text is messages written out"):
        read_prompts(str(tmp_path / "prompts.jsonl"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["pairs.csv", "pairs.csv.gz", "folder"])
def test_csv_with_two_columns_of_one_name_is_refused(name, streaming, tmp_path):
    text = "\ufeffchosen,prompt,rejected,chosen\na,b,c,d\n".encode()
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    (path / "a.csv" if name == "folder" else path).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    with pytest.raises(ValueError, match=r"a?(pairs)?\.csv(\.gz)? has more than one column named 'chosen'"):
        load_pairs(str(path), streaming=streaming)
    (tmp_path / "b.csv").write_text("prompt,chosen,rejected,chosen.1,,\na,b,c,d,e,f\n")
    assert next(iter(load_pairs(str(tmp_path / "b.csv"), streaming=streaming)))["chosen.1"] == "d"


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["train.jsonl", "more.csv"], r"folder: 1 of 2 files are not read \(first: more\.csv\): of a folder, files"),
        (["a/train.jsonl", "a/more.jsonl", "b.jsonl"], r"2 of 3 files are not read \(first: a/more\.jsonl\)"),
        (["train.jsonl", "test-0.jsonl", "dataset_infos.json", ".hidden.jsonl"], None),
        (["a.jsonl", "b.jsonl"], None),
        (["train.jsonl", "more.jsonl", "README.md"], None),
    ],
)
def test_files_of_a_folder_that_are_not_read_are_told(files, told, tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for file in files:
        path = tmp_path / "folder" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        text = {".csv": "prompt,chosen,rejected\na,b,c\n", ".json": "{}"}.get(path.suffix, json.dumps(row) + "\n")
        path.write_text(text)
    with pytest.warns(UserWarning, match=told) if told else warnings.catch_warnings():
        warnings.filterwarnings("always" if told else "error", ".*files are not read")
        assert len(load_pairs(str(tmp_path / "folder"))) == (2 if "b.jsonl" in files and not told else 1)
