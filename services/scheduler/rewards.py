"""What a device's work was worth: useful signal per second, in [0, 1].

Source: Chen, Horvath & Richtarik, "Optimal Client Sampling for Federated Learning", TMLR 2022
(arXiv 2010.13723): the variance of the pooled gradient is least when a client is sampled in
proportion to its weight times the norm of its gradient.
Differs in: the norm is estimated by the root mean square of the measured slopes; it is taken per
second of work, because a round waits for its devices; divided by the largest of the last rounds,
because slopes fall as the job goes on.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.messages import Contribution

WINDOW_ROUNDS = 32
LATE_SHARE = 0.5
"""What a late part is worth: it counts, but a round did not wait for it."""
WORK_FLOOR_S = 0.05
"""Below this the link, not the measuring, decides how long a device takes."""


def signal_per_s(contribution: Contribution) -> float:
    """Gradient norm x weight x probes per second of work, before it is normalised."""
    if not contribution.parts or contribution.probes <= 0:
        return 0.0
    work_s = max(contribution.work_s, WORK_FLOOR_S)
    in_time = 1 - (1 - LATE_SHARE) * min(1.0, contribution.late / contribution.parts)
    return contribution.slope * contribution.weight * contribution.probes / work_s * in_time


@dataclass(slots=True)
class Rewards:
    """Normalises by the largest signal per second of the last rounds."""

    _largest: deque[float] = field(default_factory=lambda: deque[float](maxlen=WINDOW_ROUNDS))

    def of(self, contributions: Sequence[Contribution]) -> dict[str, float]:
        """The reward of each device of one round's report; the report enters the window."""
        signals = {each.device: signal_per_s(each) for each in contributions}
        if signals:
            self._largest.append(max(signals.values()))
        largest = max(self._largest, default=0.0)
        return {name: signal / largest if largest else 0.0 for name, signal in signals.items()}
