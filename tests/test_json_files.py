"""JSON and files of values: what is written can be read back, and every fault is one line with its place."""

from __future__ import annotations

import math

import pytest

from ground.errors import InputError
from ground.json_file import as_read_back, json_line, json_text, read_json, read_json_lines, write_json
from ground.value_file import read_toml, read_yaml
from ground.whole_file import write_whole


def test_what_is_no_number_is_null_for_people_and_refused_where_it_would_be_lost(tmp_path):
    value = {"a": (math.nan, 1.5), "b": math.inf}
    assert as_read_back(value) == {"a": [None, 1.5], "b": None}
    assert "NaN" not in json_text(value)
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_line(value)
    with pytest.raises(InputError, match=r"^\S*/x\.json: cannot hold these values: [^\n]+$"):
        write_json(tmp_path / "x.json", value)
    with pytest.raises(InputError, match=r"^\S*/x\.json: cannot hold these values: [^\n]+$"):
        write_json(tmp_path / "x.json", {"a": {1, 2}})
    assert list(tmp_path.iterdir()) == []


def test_a_line_is_one_line_whatever_it_holds(tmp_path):
    values = [{"a": "one\u2028two\nthree\x85"}, {"a": "\ud800"}, {}]
    text = "".join(json_line(value) + "\n" for value in values)
    assert len(text.splitlines()) == 3
    (tmp_path / "x.jsonl").write_text(text)
    assert list(read_json_lines(tmp_path / "x.jsonl")) == list(enumerate(values, 1))


def test_values_written_are_the_values_read(tmp_path):
    value = {"name": "µ", "rows": [1, 2.5, None, True], "inner": {"x": "\u2028"}}
    write_json(tmp_path / "new" / "x.json", value)
    assert read_json(tmp_path / "new" / "x.json") == value
    (tmp_path / "y.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "new" / "x.json").read_bytes())
    assert read_json(tmp_path / "y.json") == value


FAULTS = {
    "no end": (read_json, b'{\n "a": 1', r"line 2, column 8: Expecting ',' delimiter"),
    "a list": (read_json, b"[1]", "not a JSON object"),
    "not text": (read_json, b'{"a": "\xff"}', "is not UTF-8 text"),
    "deep": (read_json, b"[" * 100_000, "is nested too deeply"),
    "a line": (
        lambda path: list(read_json_lines(path)),
        b'{}\n\n{"a" 1}\n',
        "line 3, column 6: Expecting ':' delimiter",
    ),
    "a line that is a list": (lambda path: list(read_json_lines(path)), b"{}\n[]\n", "line 2: not a JSON object"),
    "TOML": (read_toml, b"a = \n", r"Invalid value \(at line 1, column 5\)"),
    "YAML": (read_yaml, b"a: [1\nb: 2\n", r"while parsing [^\n]* line 2, column 2"),
    "a YAML list": (read_yaml, b"- 1\n", "not a mapping"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_one_line_with_its_place(case, tmp_path):
    read, content, message = FAULTS[case]
    file = tmp_path / "x"
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"^\S*/x: {message}[^\n]*$"):
        read(file)


@pytest.mark.parametrize("read", (read_json, read_toml, read_yaml, lambda path: list(read_json_lines(path))))
def test_a_missing_file_is_one_line(read, tmp_path):
    with pytest.raises(InputError, match=r"^\S*/none: No such file or directory$"):
        read(tmp_path / "none")


def test_a_file_that_cannot_be_put_there_leaves_nothing(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "kept").touch()
    with pytest.raises(InputError, match=r"^\S*/x: cannot be written: Is a directory$"):
        write_whole(tmp_path / "x", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
