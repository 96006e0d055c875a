"""Local steps down the loss in closed form: many, and none of them sends a token forward.

Source: Reddi et al., Adaptive Federated Optimization (ICLR 2021): clients take steps of their own,
and what they moved by is the server's gradient. Kingma and Ba, Adam (ICLR 2015), for the steps.
Differs in: the move leaves the device as its products with a round's directions.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shared.engine.closed_form import ClosedForm, Kept
from shared.engine.drawing import generator, mini_batches
from shared.engine.job import Job
from shared.engine.protocol import Probe
from shared.errors import EngineError
from shared.messages import LocalSteps

_MEAN, _SQUARE, _TINY = 0.9, 0.99, 1e-8


def descended(
    job: Job, closed: ClosedForm, request: Probe, local: LocalSteps, sites: Sequence[Kept]
) -> NDArray[np.float64]:
    """By how much the device would move theta from where it stands: (d,) float64, 0 outside scope.

    `local.steps` steps of Adam, each on a mini-batch of `local.rows` of `sites`, which a key of
    job, round and device draws.

    Raises:
        EngineError: the steps diverged.
    """
    first, count = job.layout.span(request.scope)
    span = slice(first, first + count)
    start = job.adapter.values()
    place = start.astype(np.float64)
    mean, square = np.zeros(len(place)), np.zeros(len(place))
    batches = mini_batches(
        generator(job, request.batch_round or request.round, 0, "steps"), len(sites), local.rows
    )
    for step in range(1, local.steps + 1):
        chosen = [sites[number] for number in next(batches)]
        losses, gradient = closed.gradient(chosen, place.astype(np.float32))
        gradient /= max(1, int(losses.weight.sum()))
        mean += (1 - _MEAN) * (gradient - mean)
        square += (1 - _SQUARE) * (np.square(gradient) - square)
        length = np.sqrt(square / (1 - _SQUARE**step)) + _TINY
        place[span] -= (local.rate * (mean / (1 - _MEAN**step)) / length)[span]
    if not np.isfinite(place).all():
        raise EngineError("the local steps diverged: lower the job's local rate")
    return place - start
