"""What ensembles have done, written by the worker's thread, read by others at any time."""

from dataclasses import dataclass, field

from services.proxy_inference.ensemble.drafting import MOST_DRAFTS


@dataclass
class Counts:
    """Since the process began."""

    passes: int = 0
    tokens: int = 0
    """Written by ensembles."""
    seconds: float = 0.0
    """Spent in their passes."""
    drafted: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    """By position: the first, second ... draft after what is certain."""
    taken: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    rollbacks: int = 0
    """Times a cache was cut back because a draft was not taken."""
    divergences: int = 0
    """Positions at which the two below were measured."""
    from_large: float = 0.0
    """Sum of KL(P || L), nats."""
    from_tuned: float = 0.0
    """Sum of KL(P || M+), nats."""
