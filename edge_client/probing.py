"""Work of the kind `probe`: slopes along directions of a round's pool."""

from edge_client.measured import Ask, Measured
from edge_client.state import Speeded
from shared.engine.protocol import Probe, Probed
from shared.messages import ProbeWork, WorkAssigned
from shared.ranges import width


async def probe(assigned: WorkAssigned, work: ProbeWork, ask: Ask) -> Measured:
    """What the engine measures along `work.ranges`.

    Raises:
        EngineError: the engine refused or died.
    """
    key = assigned.key
    request = Probe(
        job=key.job,
        round=key.round,
        stream_round=assigned.stream_round,
        how=work.how,
        ranges=work.ranges,
        eps=assigned.eps,
        batch_rows=assigned.batch_rows,
        scope=assigned.scope,
        digest=assigned.digest,
        batch_round=assigned.batch_round,
        local=work.local,
    )
    probed = await ask(request, Probed)
    what: Speeded = "exact_s" if work.how == "exact" else "probe_s"
    unit_s = probed.seconds if work.how == "exact" else probed.seconds / max(width(work.ranges), 1)
    return Measured(probed.result, probed.seconds, probed.passes, what, unit_s)
