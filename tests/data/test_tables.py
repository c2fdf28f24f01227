import gzip
import json

import pytest

from hybrid_lightning.data.tables import read_table, to_text
from hybrid_lightning.errors import DataError

TABLE = [{"question": "a, b", "answer": "007"}, {"question": 'say "x"\nnow', "answer": "2020-01-01"}]


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_text_files_are_read_as_they_are(tmp_path):
    for name, content in (
        ("t.jsonl", "\n".join(map(json.dumps, TABLE)) + "\n\n"),
        ("t.json", json.dumps(TABLE, indent=1)),
        ("t.csv", 'question,answer\n"a, b",007\n"say ""x""\nnow",2020-01-01\n'),
        ("T.CSV", '\ufeffquestion,answer\r\n"a, b",007\r\n\r\n"say ""x""\nnow",2020-01-01\r\n'),
        ("t.jsonl.gz", gzip.compress("\n".join(map(json.dumps, TABLE)).encode(), mtime=0)),
    ):
        assert read_table("train", write(tmp_path, name, content)) == TABLE


def test_malformed_files_are_named(tmp_path):
    for name, content, message in (
        ("t.jsonl", '{"a": 1}\n{"a": \n', "t.jsonl, line 2 is not valid JSON: Expecting value at column 7"),
        ("t.jsonl", "\n[1, 2]\n", r"line 2 is \[1, 2\]; it must be a JSON object"),
        ("t.jsonl", b'{"a": "\xe9"}', "UTF-8"),
        ("t.jsonl.gz", '{"a": 1}', "cannot be read: Not a gzipped file"),
        ("t.json", '{"a": 1}\n{"a": 2}', r"line 2, column 1: not valid JSON: Extra data; name it .jsonl"),
        ("t.json", '{"data": [1]}', "must hold a JSON list of objects"),
        ("t.csv", "q,a\n", "has no rows"),
        ("t.csv", "q,a\nx,1\ny,2,3\n", "line 3 has 3 fields, but the first line names 2 columns"),
        ("t.csv", "q,q\nx,1\n", "names a column twice: q"),
        ("t.csv", 'q,a\n"x,1\n', "is not valid CSV: unexpected end of data"),
        ("t.parquet", "nothing", "is not a readable Parquet file"),
        ("t.txt", "x", r"unknown file type; its name must end in one of .csv, .json, .jsonl, .parquet"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            read_table("train", write(tmp_path, name, content))
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(DataError, match=r"validation='.*gone.jsonl' does not exist \(looked for /"):
        read_table("validation", str(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        read_table("train", str(tmp_path))


def test_numbers_have_one_exact_form():
    forms = {5.0: "5", -0.0: "0", 0.1: "0.1", 1e-7: "0.0000001", 10**30: "1" + "0" * 30, " 5.0": " 5.0", True: "True"}
    assert {value: to_text(value) for value in forms} == forms
    for none in (None, float("nan"), 1.5e16, [1]):
        with pytest.raises(ValueError):
            to_text(none)
