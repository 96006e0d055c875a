"""Rows of a JSONL file, each as the text before an answer and the answer.

A row is `{"prompt", "completion"}`, or `{"text", "label"}` with the task's template and label
words. A row that cannot be used is refused with its file, its line and the reason; the rest is
used. Knows no tokens: what is too long is cut where the tokens are (`engine/examples.py`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from shared.errors import EngineError
from shared.messages import Task

REFUSED_SHOWN = 20
"""So many refusals are kept in words; the rest are counted."""

LABELS_SHOWN = 8

_PLACE = "{text}"


class _RefusalError(Exception):
    """Why one row cannot be used."""


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row. The prompt is head + body + tail; only `body` may be shortened.

    `label` is the index of the row's label in the task's labels, -1 for a row of prompt and
    completion, whose answer then ends where the model's text ends.
    """

    head: str
    body: str
    tail: str
    completion: str
    label: int

    @property
    def prompt(self) -> str:
        return self.head + self.body + self.tail


@dataclass(frozen=True, slots=True)
class Dataset:
    """The usable rows in file order, and the first refusals as `<file>:<line>: why`."""

    rows: list[Row]
    refused: list[str]
    refused_rows: int


def read(path: str, task: Task) -> Dataset:
    """The rows of a JSONL file as `task` wants them.

    Raises:
        EngineError: the file cannot be read or holds no usable row, or the task contradicts
            itself; names the file or the field.
    """
    check_task(task)
    numbers = {label: index for index, label in enumerate(task.labels)}
    rows: list[Row] = []
    refused: list[str] = []
    count = 0
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}; give a JSONL file") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line, task, numbers))
        except _RefusalError as refusal:
            count += 1
            if count <= REFUSED_SHOWN:
                refused.append(f"{path}:{number}: {refusal}")
    if not rows:
        first = f"; first: {refused[0]}" if refused else "; it is empty"
        raise EngineError(f"{path}: no usable row among {count}{first}")
    return Dataset(rows, refused, count)


def check_task(task: Task) -> None:
    """Find a task that no row could satisfy.

    Raises:
        EngineError: the template lacks `{text}`, or `choices` has fewer than two labels.
    """
    if task.template.count(_PLACE) != 1:
        raise EngineError(f"task: template must hold {_PLACE} exactly once: {task.template!r}")
    if task.loss == "choices" and len(task.labels) < 2:
        raise EngineError("task: loss choices needs at least two labels; add them, or use tokens")


def split_template(template: str) -> tuple[str, str]:
    """What stands before and after `{text}`."""
    head, _, tail = template.partition(_PLACE)
    return head, tail


def _row(line: bytes, task: Task, numbers: dict[str, int]) -> Row:
    try:
        parsed: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _RefusalError(f"not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise _RefusalError("not a JSON object")
    fields = cast("dict[str, object]", parsed)
    if "prompt" in fields or "completion" in fields:
        if task.loss == "choices":
            raise _RefusalError(_needs(task))
        return Row("", _text(fields, "prompt"), "", _text(fields, "completion"), -1)
    if not task.labels or not fields.keys() & {"text", "label"}:
        raise _RefusalError(_needs(task))
    text, label = _text(fields, "text"), _label(fields)
    if label not in numbers:
        raise _RefusalError(f"its label is not one of this job's: {_labels(task)}")
    head, tail = split_template(task.template)
    return Row(head, text, tail, task.labels[label], numbers[label])


def _needs(task: Task) -> str:
    """What rows a job needs, for whoever gave others."""
    if not task.labels:
        return "this job has no labels: it needs rows of prompt and completion"
    return f"this job needs rows of text and label (labels: {_labels(task)})"


def _labels(task: Task) -> str:
    shown = list(task.labels)[:LABELS_SHOWN]
    return ", ".join(shown) + ", ..." * (len(task.labels) > LABELS_SHOWN)


def _text(fields: dict[str, object], name: str) -> str:
    value = fields.get(name)
    if value is None:
        raise _RefusalError(f"field {name} is missing")
    if not isinstance(value, str):
        raise _RefusalError(f"field {name} is not a string")
    if not value.strip():
        raise _RefusalError(f"field {name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _RefusalError(f"field {name} holds half a surrogate pair") from error
    return value


def _label(fields: dict[str, object]) -> str:
    value = fields.get("label")
    if value is None:
        raise _RefusalError("field label is missing")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _RefusalError("field label is neither a string nor an integer")
    return str(value)
