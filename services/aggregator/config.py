"""The aggregator's settings."""

from typing import Annotated

import msgspec
from msgspec import Meta


class Settings(msgspec.Struct, frozen=True):
    """The aggregator: owns jobs and rounds, writes the log."""

    servers: Annotated[
        tuple[str, ...],
        Meta(
            description="Addresses of the broker, nats:// or tls://; more than one for a cluster."
        ),
    ] = ("nats://127.0.0.1:4222",)
    log_level: Annotated[
        str, Meta(description="What is logged, on stderr: debug, info, warning or error.")
    ] = "info"
    batch: Annotated[int, Meta(description="Updates folded by one append, at most.")] = 256
    report_every_s: Annotated[
        float, Meta(description="Seconds between two reports of its counters to telemetry.")
    ] = 5.0
