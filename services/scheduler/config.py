"""The scheduler's settings."""

from typing import Annotated

import msgspec
from msgspec import Meta


class Settings(msgspec.Struct, frozen=True):
    """The scheduler: decides which device measures what."""

    servers: tuple[str, ...] = ("nats://127.0.0.1:4222",)
    log_level: str = "info"
    report_every_s: Annotated[float, Meta(gt=0)] = 10.0
    seed: int = 0
    """Orders devices that are equally worth trying, and spreads their times to come back."""
    idle_comeback_s: Annotated[float, Meta(gt=0, le=1e6)] = 900.0
    """When a device with nothing to do asks again, if nobody wakes it before."""
