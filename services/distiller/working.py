"""One distillation from files to figures: models are loaded, asked, trained and judged here."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from services.distiller import distilling, public
from services.distiller.buckets import Buckets, Floats
from services.distiller.config import Settings
from services.distiller.distilling import Judged
from services.distiller.kept import Kept, checkpoint_digest, file_digest
from services.distiller.large import Large
from services.distiller.public import Public
from services.distiller.student import Student, check_tokens
from services.distiller.waiting import Waiting
from shared.adapter import UNIT
from shared.engine.model import Adaptation
from shared.errors import EngineError
from shared.messages import Distilled

PASSES = 2
"""Times that each row is read unless steps are given."""
TRAININGS = 2
"""Of the model, and of its anchor."""
_TOLD = 10
"""Times that a training says how far it is."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Made:
    """What one distillation comes to."""

    start: NDArray[np.int32]
    """(d,): theta of the distilled adapter."""
    anchor: NDArray[np.int32]
    """(d,): theta of what stands for the base model beside it."""
    before: Judged
    after: Judged
    figures: Distilled


def work(job: Waiting, settings: Settings, say: Say) -> Made:
    """Distil the job's adapter, and its anchor.

    Raises:
        EngineError: a model or a file cannot be used; names it.
        OSError: the cache cannot be written.
    """
    torch.set_num_threads(settings.threads or os.cpu_count() or 1)
    folder = Path(settings.cache).expanduser() if settings.cache else None
    kept = Kept(folder, settings.max_cache_bytes)
    student = _student(job, settings, kept)
    large = Large(
        Path(settings.large),
        threads=settings.threads or os.cpu_count() or 1,
        max_tokens=job.spec.task.max_tokens,
    )
    try:
        rows, heldout = _rows(job, settings, large)
        if not (heldout.answered or settings.force):
            raise EngineError(str(UNJUDGED))
        check_tokens(Path(settings.small), rows, large.model)
        say(f"{len(rows.examples)} rows to learn from, {len(heldout.examples)} held out")
        asked = _Asked(large, Path(settings.large), kept, settings.top_k, student.width, say)
        of_rows = asked.about(rows, settings.temperature)
        of_heldout = asked.about(heldout, 1.0)
    finally:
        large.close()
    how = _how(settings, rows)
    tuned, old = job.adapter.values(), job.anchor

    def told(name: str) -> distilling.Told:
        every = max(how.steps // _TOLD, 1)

        def tell(step: int, loss: float) -> None:
            if not step % every:
                say(f"{name}: step {step} of {how.steps}, loss {loss:.4f}")

        return tell

    before = distilling.judged(student, tuned, old, heldout, of_heldout, how.alpha)
    new = distilling.distil(student, tuned, old, rows, of_rows, how, told("model"))
    start = theta(new)
    anchor = theta(distilling.reanchored(student, old, rows, of_rows, how, told("anchor")))
    new, beside = _floats(start), _floats(anchor)
    after = distilling.judged(student, new, beside, heldout, of_heldout, how.alpha)
    left = distilling.left_to_learn(student, new, tuned, old, heldout, of_heldout, how.alpha)
    passes = TRAININGS * how.steps * how.batch_rows / len(rows.examples)
    figures = Distilled(
        alpha=how.alpha,
        rows=len(rows.examples),
        heldout_rows=len(heldout.examples),
        tokens=round(passes * rows.tokens),
        steps=how.steps,
        teacher_entropy_before=before.entropy,
        teacher_entropy_after=after.entropy,
        kl_before=before.kl,
        kl_after=left,
        held_out_loss_before=_known(before.small_loss),
        held_out_loss_after=_known(after.small_loss),
        ensemble_loss_before=_known(before.ensemble_loss),
        ensemble_loss_after=_known(after.ensemble_loss),
        large_loss=_known(before.large_loss),
        accuracy_before=_known(before.small_accuracy),
        accuracy_after=_known(after.small_accuracy),
    )
    return Made(start, anchor, before, after, figures)


@dataclass(frozen=True)
class Obstacle:
    """What speaks against opening the epoch, and what to do about it."""

    why: str
    mend: str

    def __str__(self) -> str:
        return (
            f"{self.why}, so the epoch was not opened; {self.mend}, or open it all the same "
            "(--force)"
        )


UNJUDGED = Obstacle(
    "no held-out row has an answer to tell whether the small model becomes better",
    "name rows with answers (--heldout)",
)


def obstacle(made: Made) -> Obstacle | None:
    """Why the epoch should not be opened; None where nothing speaks against it."""
    before, after = made.before.small_loss, made.after.small_loss
    if math.isnan(after) or math.isnan(before):
        return UNJUDGED
    if after > before:
        return Obstacle(
            f"the small model's loss on held-out rows rose from {before:.4f} to {after:.4f}",
            "give more --public rows with answers, lower --alpha or --rate",
        )
    return None


def theta(values: Floats) -> NDArray[np.int32]:
    """`values` (d,) in theta's integers.

    Raises:
        EngineError: they would leave int32: the training went astray.
    """
    units = np.rint(values.astype(np.float64) / UNIT)
    limits = np.iinfo(np.int32)
    if not (np.isfinite(units).all() and limits.min <= units.min() <= units.max() <= limits.max):
        raise EngineError("the distilled adapter is too large to be one; lower --rate")
    return units.astype(np.int32)


def _floats(units: NDArray[np.int32]) -> Floats:
    return (units * UNIT).astype(np.float32)


def _known(figure: float) -> float | None:
    return None if math.isnan(figure) else figure


@dataclass(frozen=True)
class _Asked:
    """The large model's answers, from the disk where it has given them before."""

    large: Large
    path: Path
    kept: Kept
    k: int
    width: int
    say: Say

    def about(self, rows: Public, temperature: float) -> Buckets:
        width = min(self.width, self.large.model.size)
        count = len(rows.examples)

        def ask() -> Buckets:
            self.say(f"asking the large model about {count} rows")
            return self.large.heard(rows, k=self.k, width=width, temperature=temperature)

        parts = ("large", file_digest(self.path), rows.digest, self.k, temperature, width)
        return self.kept.get(parts, ask)


def _student(job: Waiting, settings: Settings, kept: Kept) -> Student:
    manifest, layout = job.adapter.manifest, job.adapter.layout
    blocks = Adaptation(
        manifest.architecture,
        manifest.seed,
        manifest.epoch_of_a,
        manifest.blocks,
        layout.offsets,
    )
    folder = Path(settings.small)
    student = Student(folder, blocks, device=settings.device)
    origin = (checkpoint_digest(folder), manifest.seed, manifest.epoch_of_a, manifest.blocks)
    student.keep(kept, origin)
    return student


def _rows(job: Waiting, settings: Settings, large: Large) -> tuple[Public, Public]:
    """What is learned from, and what is held out."""
    task = job.spec.task
    rows = public.read(Path(settings.public), task, large.model, settings.rows)
    if not settings.heldout:
        return rows.split(settings.heldout_share, settings.seed)
    return rows, public.read(Path(settings.heldout), task, large.model, settings.rows)


def _how(settings: Settings, rows: Public) -> distilling.Settings:
    size = min(settings.batch_rows, len(rows.examples))
    return distilling.Settings(
        alpha=settings.alpha,
        answers=settings.answers,
        temperature=settings.temperature,
        steps=settings.steps or -(-PASSES * len(rows.examples) // size),
        batch_rows=size,
        rate=settings.rate,
        seed=settings.seed,
    )
