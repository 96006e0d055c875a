"""The scheduler's settings."""

from typing import Annotated

import msgspec
from msgspec import Meta


class Settings(msgspec.Struct, frozen=True):
    """The scheduler: decides which device measures what."""

    servers: Annotated[
        tuple[str, ...],
        Meta(
            description="Addresses of the broker, nats:// or tls://; more than one for a cluster."
        ),
    ] = ("nats://127.0.0.1:4222",)
    log_level: Annotated[
        str, Meta(description="What is logged, on stderr: debug, info, warning or error.")
    ] = "info"
    report_every_s: Annotated[
        float, Meta(gt=0, description="Seconds between two reports of its counters to telemetry.")
    ] = 10.0
    seed: Annotated[
        int,
        Meta(
            description="Orders devices that are equally worth trying, "
            "and spreads their times to come back."
        ),
    ] = 0
    idle_comeback_s: Annotated[
        float,
        Meta(
            gt=0,
            le=1e6,
            description="Seconds until a device with nothing to do asks again, "
            "if nobody wakes it before.",
        ),
    ] = 900.0
