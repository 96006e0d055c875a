"""Telemetry's settings."""

from shared.service import HttpSettings, Port


class Settings(HttpSettings, frozen=True):
    """Telemetry: history and counters of the fleet over HTTP."""

    port: Port = 9464
