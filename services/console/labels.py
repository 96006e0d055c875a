"""The labels of a job and the words that stand for them."""

from pathlib import Path

from services.console.failure import Usage
from shared import dataset
from shared.errors import ConfigError, EngineError
from shared.messages import Task

MAX_LABELS = 1000


def parse_labels(text: str) -> dict[str, str]:
    """Labels and their words from `label=word,label2`; a label alone is its own word.

    Raises:
        Usage: a label is empty or named twice.
    """
    labels: dict[str, str] = {}
    for part in text.split(","):
        label, _, word = part.strip().partition("=")
        if not label:
            raise Usage(f"--labels {text!r}: an empty label; give label=word,label2=word2")
        if label in labels:
            raise Usage(f"--labels: {label!r} is named twice")
        labels[label] = word or label
    return labels


def labels_of(path: Path) -> dict[str, str]:
    """The labels in the rows of a file or directory, sorted, each its own word.

    Raises:
        ConfigError: it cannot be read, or holds no labels or too many.
    """
    try:
        found = dataset.labels_in(str(path), at_most=MAX_LABELS + 1)
    except EngineError as error:
        raise ConfigError(str(error)) from error
    if len(found) > MAX_LABELS:
        raise ConfigError(f"{path} has more than {MAX_LABELS} labels")
    if not found:
        raise ConfigError(f'{path} has no row with a label: {{"text": ..., "label": ...}}')
    return {label: label for label in sorted(found)}


def spaced(task: Task) -> dict[str, str]:
    """The label words as they follow the template: after a space, unless it ends in one."""
    _, _, tail = task.template.partition("{text}")
    if not tail or tail[-1].isspace():
        return task.labels
    return {label: word if word[0].isspace() else f" {word}" for label, word in task.labels.items()}
