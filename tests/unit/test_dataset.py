"""Rows of private data become examples, and what cannot be used is named."""

import json
from pathlib import Path

import pytest

from shared import dataset
from shared.errors import EngineError
from shared.messages import Task

CHOICES = Task("choices", "News: {text}\nTopic:", {"0": " World", "1": " Sports"})
TOKENS = Task("tokens")


def a_file(folder: Path, *lines: object) -> str:
    path = folder / "rows.jsonl"
    written = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_bytes("\n".join(written).encode())
    return str(path)


def test_text_and_label_are_put_into_the_template(tmp_path: Path) -> None:
    found = dataset.read(a_file(tmp_path, {"text": "a b", "label": 1}), CHOICES)
    (row,) = found.rows
    assert row.prompt == "News: a b\nTopic:"
    assert (row.head, row.body, row.tail) == ("News: ", "a b", "\nTopic:")
    assert (row.completion, row.label) == (" Sports", 1)


def test_prompt_and_completion_stand_as_they_are(tmp_path: Path) -> None:
    path = a_file(tmp_path, {"prompt": "2+2=", "completion": "4"})
    (row,) = dataset.read(path, TOKENS).rows
    assert (row.prompt, row.completion, row.label) == ("2+2=", "4", -1)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"label": 1}', "field text is missing"),
        ('{"text": "a"}', "field label is missing"),
        ('{"text": 3, "label": 1}', "field text is not a string"),
        ('{"text": " \\n", "label": 1}', "field text is empty"),
        ('{"text": "a", "label": 7}', "its label is not one of this job's: 0, 1"),
        ('{"text": "a", "label": true}', "neither a string nor an integer"),
        ('{"text": "\\ud800", "label": 1}', "half a surrogate pair"),
        ('{"prompt": "a", "completion": "b"}', "needs rows of text and label (labels: 0, 1)"),
        ('{"question": "a"}', "needs rows of text and label (labels: 0, 1)"),
    ],
)
def test_a_malformed_row_is_refused_with_file_and_line(tmp_path: Path, line: str, why: str) -> None:
    path = a_file(tmp_path, {"text": "fine", "label": 0}, "", line, {"text": "x", "label": "1"})
    found = dataset.read(path, CHOICES)
    assert [row.body for row in found.rows] == ["fine", "x"]
    assert found.refused_rows == 1
    assert found.refused[0].startswith(f"{path}:3: ")
    assert why in found.refused[0]


def test_rows_of_text_and_label_need_a_job_with_labels(tmp_path: Path) -> None:
    path = a_file(tmp_path, {"text": "a", "label": 0}, {"prompt": "2+2=", "completion": "4"})
    (refused,) = dataset.read(path, TOKENS).refused
    assert refused.endswith("this job has no labels: it needs rows of prompt and completion")


def test_many_labels_are_not_all_named(tmp_path: Path) -> None:
    many = Task("choices", labels={str(number): f" {number}" for number in range(20)})
    with pytest.raises(EngineError, match=r"\(labels: 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\)"):
        dataset.read(a_file(tmp_path, {"prompt": "a", "completion": "b"}), many)


def test_bytes_that_are_not_text_cost_one_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "label": 0}\r\n{"text": "\xff", "label": 0}\r\n')
    found = dataset.read(str(path), CHOICES)
    assert [row.body for row in found.rows] == ["a"]
    assert found.refused_rows == 1


def test_refusals_are_counted_but_not_all_kept(tmp_path: Path) -> None:
    found = dataset.read(a_file(tmp_path, {"text": "a", "label": 0}, *["?"] * 50), CHOICES)
    assert found.refused_rows == 50
    assert len(found.refused) == dataset.REFUSED_SHOWN


def test_a_file_without_a_usable_row_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = a_file(tmp_path, "?")
    with pytest.raises(EngineError, match=r"rows\.jsonl: no usable row among 1; first: .*:1:"):
        dataset.read(path, CHOICES)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"gone\.jsonl: cannot be read"):
        dataset.read(str(tmp_path / "gone.jsonl"), CHOICES)


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (Task("tokens", "no place"), "template must hold"),
        (Task("tokens", "{text} {text}"), "template must hold"),
        (Task("choices", "{text}", {"0": "only"}), "at least two labels"),
    ],
)
def test_a_task_that_no_row_satisfies_is_refused(tmp_path: Path, task: Task, why: str) -> None:
    with pytest.raises(EngineError, match=why):
        dataset.read(a_file(tmp_path, {"text": "a", "label": 0}), task)
