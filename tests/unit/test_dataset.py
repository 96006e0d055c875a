"""Rows of private data become examples, and what cannot be used is named."""

import json
from pathlib import Path

import pytest

from shared.dataset import REFUSED_SHOWN, Dataset, Row, Turn
from shared.errors import EngineError
from shared.messages import Task

CHOICES = Task("choices", "News: {text}\nTopic:", {"0": " World", "1": " Sports"})
TOKENS = Task("tokens")


def a_file(folder: Path, *lines: object) -> str:
    path = folder / "rows.jsonl"
    written = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_bytes("\n".join(written).encode())
    return str(path)


def plain_rows(found: Dataset) -> list[Row]:
    return [row for row in found.rows if isinstance(row, Row)]


def test_text_and_label_are_put_into_the_template(tmp_path: Path) -> None:
    found = Dataset(a_file(tmp_path, {"text": "a b", "label": 1}), CHOICES)
    (row,) = plain_rows(found)
    assert row.prompt == "News: a b\nTopic:"
    assert (row.head, row.body, row.tail) == ("News: ", "a b", "\nTopic:")
    assert (row.completion, row.label) == (" Sports", 1)


def test_each_turn_of_the_assistant_answers_all_before_it(tmp_path: Path) -> None:
    said = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "+1?")]
    said.append(("assistant", "5"))
    path = a_file(tmp_path, {"messages": [{"role": r, "content": c, "x": 1} for r, c in said]})
    assert Dataset(path, TOKENS).rows == [Turn(tuple(said[:2]), "4"), Turn(tuple(said[:4]), "5")]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ("hello", "field messages is not a list of messages"),
        (["hello"], "message 1 is not an object of role and content"),
        ([{"role": "robot", "content": "a"}], "message 1: its role is none of system, user"),
        ([{"role": "user", "content": ["a"]}], "message 1: field content is not a string"),
        ([{"role": "user", "content": "a"}], "no message of role assistant answers another"),
        ([{"role": "assistant", "content": "a"}], "no message of role assistant answers another"),
        ([{"role": "assistant", "content": None, "tool_calls": [1]}], "message 1 calls tools"),
    ],
)
def test_a_conversation_that_teaches_nothing_is_refused(
    tmp_path: Path, messages: object, why: str
) -> None:
    path = a_file(tmp_path, {"prompt": "a", "completion": "b"}, {"messages": messages})
    found = Dataset(path, TOKENS)
    assert found.refused_rows == 1
    assert found.refused[0].startswith(f"{path}:2: {why}")


def test_a_conversation_that_the_template_refuses_costs_that_row(tmp_path: Path) -> None:
    def check(turn: Turn) -> None:
        if turn.before[0][0] == "system":
            raise EngineError("system role not supported")

    both = [
        [{"role": first, "content": "a"}, {"role": "assistant", "content": "b"}]
        for first in ("user", "system")
    ]
    path = a_file(tmp_path, *({"messages": messages} for messages in both))
    found = Dataset(path, TOKENS, check)
    assert found.rows == [Turn((("user", "a"),), "b")]
    assert found.refused == [f"{path}:2: system role not supported"]


def test_prompt_and_completion_stand_as_they_are(tmp_path: Path) -> None:
    path = a_file(tmp_path, {"prompt": "2+2=", "completion": "4"})
    (row,) = plain_rows(Dataset(path, TOKENS))
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
        ('{"messages": []}', "a conversation has no label: this job needs rows of text and label"),
        ('{"question": "a"}', "needs rows of text and label (labels: 0, 1)"),
    ],
)
def test_a_malformed_row_is_refused_with_file_and_line(tmp_path: Path, line: str, why: str) -> None:
    path = a_file(tmp_path, {"text": "fine", "label": 0}, "", line, {"text": "x", "label": "1"})
    found = Dataset(path, CHOICES)
    assert [row.body for row in plain_rows(found)] == ["fine", "x"]
    assert found.refused_rows == 1
    assert found.refused[0].startswith(f"{path}:3: ")
    assert why in found.refused[0]


def test_rows_of_text_and_label_need_a_job_with_labels(tmp_path: Path) -> None:
    path = a_file(tmp_path, {"text": "a", "label": 0}, {"prompt": "2+2=", "completion": "4"})
    (refused,) = Dataset(path, TOKENS).refused
    assert refused.endswith("it needs rows of prompt and completion, or of messages")


def test_many_labels_are_not_all_named(tmp_path: Path) -> None:
    many = Task("choices", labels={str(number): f" {number}" for number in range(20)})
    with pytest.raises(EngineError, match=r"\(labels: 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\)"):
        Dataset(a_file(tmp_path, {"prompt": "a", "completion": "b"}), many)


def test_bytes_that_are_not_text_cost_one_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "label": 0}\r\n{"text": "\xff", "label": 0}\r\n')
    found = Dataset(str(path), CHOICES)
    assert [row.body for row in plain_rows(found)] == ["a"]
    assert found.refused_rows == 1


def test_refusals_are_counted_but_not_all_kept(tmp_path: Path) -> None:
    found = Dataset(a_file(tmp_path, {"text": "a", "label": 0}, *["?"] * 50), CHOICES)
    assert found.refused_rows == 50
    assert len(found.refused) == REFUSED_SHOWN


def test_a_file_without_a_usable_row_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = a_file(tmp_path, "?")
    with pytest.raises(EngineError, match=r"rows\.jsonl: no usable row among 1; first: .*:1:"):
        Dataset(path, CHOICES)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"gone\.jsonl: cannot be read"):
        Dataset(str(tmp_path / "gone.jsonl"), CHOICES)


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
        Dataset(a_file(tmp_path, {"text": "a", "label": 0}), task)
