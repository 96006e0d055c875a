"""The ensemble distilled into the small model, by the server's own code.

Validation rows say which alpha teaches. Where answers are public the models are heard along them;
whether the small one is taught them as well (their own cross-entropy) is the caller's to say: it
would gain by that without any ensemble.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from services.distiller.distilling import Settings, distil
from services.distiller.large import Large
from services.distiller.public import read
from services.distiller.student import Student
from services.proxy_inference.routing import Judge, gained
from shared.messages import Task
from tests.bench.learn.tasks import MODELS, Row
from tests.bench.proxy.measuring import THREADS, Adapted, ensemble, measured
from tests.bench.proxy.plan import ALPHAS, LARGE, SMALL, gguf

LIKELIEST = 64


def strength(task: Task, validation: Sequence[Row], small: Adapted, judge: Judge) -> float:
    """The alpha whose ensemble does best on the validation rows."""
    found = measured(task, validation, {"small": small})
    base = found["small"]
    return max(ALPHAS, key=lambda alpha: gained(found[ensemble(alpha)], base, judge)[0])


def distilled(
    task: Task,
    public: Sequence[Row],
    small: Adapted,
    alpha: float,
    steps: int,
    *,
    answers: bool,
) -> Adapted:
    """The small model's adapter after the ensemble at `alpha` has taught it.

    `answers`: public answers are taught too, as much as `seedwire distil` does.
    """
    settings = Settings(alpha=alpha, steps=steps)
    if not answers:
        settings = replace(settings, answers=0.0)
    large = Large(gguf(LARGE), threads=THREADS, max_tokens=task.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "public.jsonl"
        lines = [json.dumps({k: v for k, v in row.items() if k != "label"}) for row in public]
        file.write_text("\n".join(lines), encoding="utf-8")
        found = read(file, task, large.model, len(public))
    student = Student(MODELS / SMALL, small.blocks)
    said = large.heard(found, k=LIKELIEST, width=student.width, temperature=settings.temperature)
    values = small.adapter.values()
    return small.at(distil(student, values, np.zeros_like(values), found, said, settings))
