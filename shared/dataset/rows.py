"""What a row means: the text before an answer, and the answer.

A row is `{"prompt", "completion"}`, `{"text", "label"}` with the task's template and label words,
or `{"messages"}`, a conversation in which each turn of the assistant answers all before it.
Knows no tokens: what is too long is cut where the tokens are (`engine/examples.py`).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from shared.dataset.records import Record
from shared.errors import EngineError
from shared.messages import Task

LABELS_SHOWN = 8

ROLES = ("system", "user", "assistant", "tool")

_PLACE = "{text}"

Said = tuple[str, str]
"""One message: its role and its content."""


class Refusal(Exception):
    """Why one row cannot be used."""


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row. The prompt is head + body + tail; only `body` may be shortened.

    `label` is the index of the row's label in the task's labels, -1 for a row of prompt and
    completion, whose answer then ends where the model's text ends. Head and tail are the
    operator's, and so is the completion of a row with a label; all else is private.
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
class Turn:
    """One turn of the assistant, and what was said before it."""

    before: tuple[Said, ...]
    answer: str


CheckTurn = Callable[[Turn], object]
"""Raises EngineError where the model's chat template refuses what was said."""


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


def parsed(record: Record) -> dict[str, object]:
    """The record's fields.

    Raises:
        Refusal: it has none.
    """
    if record.content is None:
        raise Refusal(record.refusal)
    if not isinstance(record.content, bytes):
        return cast("dict[str, object]", record.content)
    try:
        value: object = json.loads(record.content)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refusal("not a JSON object")
    return cast("dict[str, object]", value)


class Meaning:
    """What records are for one task."""

    def __init__(self, task: Task, check: CheckTurn | None = None) -> None:
        """Raises EngineError where no row could satisfy the task."""
        check_task(task)
        self._task = task
        self._check = check
        self._numbers = {label: index for index, label in enumerate(task.labels)}
        self._head, self._tail = split_template(task.template)

    def rows(self, record: Record) -> list[Row | Turn]:
        """A row, or a conversation's turns.

        Raises:
            Refusal: nothing that the task can use.
        """
        fields, choices = parsed(record), self._task.loss == "choices"
        pair = bool(fields.keys() & {"prompt", "completion"})
        labelled = bool(self._numbers) and bool(fields.keys() & {"text", "label"})
        if labelled and (choices or not pair):
            return [self._labelled(fields)]
        if pair and not choices:
            return [Row("", _text(fields, "prompt"), "", _text(fields, "completion"), -1)]
        if "messages" not in fields:
            raise Refusal(needs(self._task))
        if choices:
            raise Refusal(f"a conversation has no label: {needs(self._task)}")
        return list(_turns(fields["messages"], self._check))

    def _labelled(self, fields: dict[str, object]) -> Row:
        text, label = _text(fields, "text"), _label(fields)
        if label not in self._numbers:
            raise Refusal(f"its label is not one of this job's: {_labels(self._task)}")
        return Row(self._head, text, self._tail, self._task.labels[label], self._numbers[label])


def needs(task: Task) -> str:
    """What rows a job needs, for whoever gave others."""
    if not task.labels:
        return "this job has no labels: it needs rows of prompt and completion, or of messages"
    return f"this job needs rows of text and label (labels: {_labels(task)})"


def _turns(value: object, check: CheckTurn | None) -> list[Turn]:
    """The turns of the assistant that answer something."""
    if not isinstance(value, list) or not value:
        raise Refusal("field messages is not a list of messages")
    said = tuple(_said(number, one) for number, one in enumerate(cast("list[object]", value), 1))
    turns = [
        Turn(said[:number], content)
        for number, (role, content) in enumerate(said)
        if role == "assistant" and number
    ]
    if not turns:
        raise Refusal("no message of role assistant answers another")
    if check is not None:
        for turn in turns:
            try:
                check(turn)
            except EngineError as error:
                raise Refusal(str(error)) from error
    return turns


def _said(number: int, value: object) -> Said:
    if not isinstance(value, dict):
        raise Refusal(f"message {number} is not an object of role and content")
    fields = cast("dict[str, object]", value)
    role = fields.get("role")
    if role not in ROLES:
        raise Refusal(f"message {number}: its role is none of {', '.join(ROLES)}")
    if fields.get("tool_calls"):
        raise Refusal(f"message {number} calls tools, which a completion cannot be tuned to")
    try:
        return str(role), _text(fields, "content")
    except Refusal as refusal:
        raise Refusal(f"message {number}: {refusal}") from refusal


def _labels(task: Task) -> str:
    shown = list(task.labels)[:LABELS_SHOWN]
    return ", ".join(shown) + ", ..." * (len(task.labels) > LABELS_SHOWN)


def _text(fields: dict[str, object], name: str) -> str:
    value = fields.get(name)
    if value is None:
        raise Refusal(f"field {name} is missing")
    if not isinstance(value, str):
        raise Refusal(f"field {name} is not a string")
    if not value.strip():
        raise Refusal(f"field {name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refusal(f"field {name} holds half a surrogate pair") from error
    return value


def _label(fields: dict[str, object]) -> str:
    label = label_of(fields)
    if label is None:
        raise Refusal("field label is missing")
    if not label:
        raise Refusal("field label is neither a string nor an integer")
    return label


def label_of(fields: dict[str, object]) -> str | None:
    """The row's label as text: None where it has none, empty where it cannot be one."""
    value = fields.get("label")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    return str(value)
