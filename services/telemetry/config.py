"""Telemetry's settings."""

from typing import Annotated

from msgspec import Meta

from shared.service import ServiceSettings


class Settings(ServiceSettings, frozen=True):
    """Telemetry: history and counters of the fleet over HTTP."""

    host: Annotated[
        str, Meta(description="The address that its HTTP port listens on; 0.0.0.0 for all.")
    ] = "127.0.0.1"
    port: Annotated[
        int,
        Meta(ge=0, le=65535, description="Its HTTP port; 0 takes a free one, the log says which."),
    ] = 9464
