"""Rows of private data: JSON lines, CSV and conversations, in a file or a directory that grows.

A row that cannot be used is refused with its file, its line and the reason; the rest is used.
Imports neither numpy nor an engine.
"""

from shared.dataset.reading import REFUSED_SHOWN, Counted, Dataset, labels_in, no_row_yet
from shared.dataset.rows import (
    LABELS_SHOWN,
    CheckTurn,
    Refusal,
    Row,
    Turn,
    check_task,
    split_template,
)

__all__ = [
    "LABELS_SHOWN",
    "REFUSED_SHOWN",
    "CheckTurn",
    "Counted",
    "Dataset",
    "Refusal",
    "Row",
    "Turn",
    "check_task",
    "labels_in",
    "no_row_yet",
    "split_template",
]
