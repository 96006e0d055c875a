"""Telemetry's settings."""

from typing import Annotated

import msgspec
from msgspec import Meta


class Settings(msgspec.Struct, frozen=True):
    """Telemetry: history and counters of the fleet over HTTP."""

    servers: tuple[str, ...] = ("nats://127.0.0.1:4222",)
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 9464
    """0 takes a free one; the log says which."""
    log_level: str = "info"
