"""The aggregator's settings."""

import msgspec


class Settings(msgspec.Struct, frozen=True):
    """The aggregator: owns jobs and rounds, writes the log."""

    servers: tuple[str, ...] = ("nats://127.0.0.1:4222",)
    log_level: str = "info"
    batch: int = 256
    """Updates folded by one append, at most."""
    report_every_s: float = 5.0
