"""Loss and accuracy of the adapter on the held-out rows."""

import numpy as np

from shared.engine.job import Job
from shared.engine.protocol import Evaluate
from shared.errors import EngineError
from shared.messages import EvaluateResult


def evaluate(job: Job, request: Evaluate) -> EvaluateResult:
    """What all held-out rows say of the adapter as it stands.

    For `tokens` a row is right when each token of its answer is the most likely one.

    Raises:
        EngineError: no held-out rows, another adapter, or a loss that is not finite.
    """
    job.require(request.digest)
    losses = job.losses(rows := job.heldout())
    if not np.isfinite(losses.loss).all():
        raise EngineError(
            "the loss at theta is not finite; the adapter has diverged: lower the job's step"
        )
    return EvaluateResult(
        examples=len(rows),
        correct=int(losses.right.sum()),
        weight=int(losses.weight.sum()),
        loss=float(losses.loss.sum()),
    )
