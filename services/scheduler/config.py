"""The scheduler's settings."""

from typing import Annotated

from msgspec import Meta

from shared.service import StreamSettings


class Settings(StreamSettings, frozen=True):
    """The scheduler: decides which device measures what."""

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
