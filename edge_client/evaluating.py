"""Work of the kind `evaluate`: loss and accuracy on a trusted device's held-out rows."""

from edge_client.measured import Ask, Measured
from shared.engine.protocol import Evaluate, Evaluated
from shared.messages import WorkAssigned


async def evaluate(assigned: WorkAssigned, ask: Ask) -> Measured:
    """What the held-out rows say of the adapter.

    Raises:
        EngineError: the engine refused or died.
    """
    request = Evaluate(job=assigned.key.job, digest=assigned.digest)
    evaluated = await ask(request, Evaluated)
    seconds = evaluated.seconds
    return Measured(evaluated.result, seconds, evaluated.passes, "evaluate_s", seconds)
