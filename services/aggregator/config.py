"""The aggregator's settings."""

from typing import Annotated

from msgspec import Meta

from shared.service import StreamSettings


class Settings(StreamSettings, frozen=True):
    """The aggregator: owns jobs and rounds, writes the log."""

    batch: Annotated[
        int, Meta(ge=1, le=1024, description="Updates folded by one append, at most.")
    ] = 256
    report_every_s: Annotated[
        float, Meta(description="Seconds between two reports of its counters to telemetry.")
    ] = 5.0
