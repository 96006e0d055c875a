"""Telemetry's settings."""

from typing import Annotated

import msgspec
from msgspec import Meta


class Settings(msgspec.Struct, frozen=True):
    """Telemetry: history and counters of the fleet over HTTP."""

    servers: Annotated[
        tuple[str, ...],
        Meta(
            description="Addresses of the broker, nats:// or tls://; more than one for a cluster."
        ),
    ] = ("nats://127.0.0.1:4222",)
    host: Annotated[
        str, Meta(description="The address that its HTTP port listens on; 0.0.0.0 for all.")
    ] = "127.0.0.1"
    port: Annotated[
        int,
        Meta(ge=0, le=65535, description="Its HTTP port; 0 takes a free one, the log says which."),
    ] = 9464
    log_level: Annotated[
        str, Meta(description="What is logged, on stderr: debug, info, warning or error.")
    ] = "info"
