"""Work of the kind `walk`: local steps from the adapter, each along one direction of the pool."""

from edge_client.measured import Ask, Measured
from shared.engine.protocol import Walk, Walked
from shared.messages import WalkWork, WorkAssigned


async def walk(assigned: WorkAssigned, work: WalkWork, ask: Ask) -> Measured:
    """What the engine meets on its way.

    Raises:
        EngineError: the engine refused or died.
    """
    key = assigned.key
    request = Walk(
        job=key.job,
        round=key.round,
        part=key.part,
        stream_round=assigned.stream_round,
        directions=work.directions,
        walk=work.walk,
        eps=assigned.eps,
        batch_rows=assigned.batch_rows,
        scope=assigned.scope,
        digest=assigned.digest,
    )
    walked = await ask(request, Walked)
    unit_s = walked.seconds / max(work.walk.steps, 1)
    return Measured(walked.result, walked.seconds, walked.passes, "probe_s", unit_s)
