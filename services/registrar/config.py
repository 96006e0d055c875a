"""The registrar's settings."""

from typing import Annotated

from msgspec import Meta

from shared.errors import ConfigError
from shared.service import ServiceSettings


class Settings(ServiceSettings, frozen=True):
    """The registrar: gives devices their identities, and takes them away."""

    registrar_file: Annotated[
        str, Meta(description="The registrar.json that `seedwire keys init` has made.")
    ] = ""
    system_creds_file: Annotated[
        str,
        Meta(
            description="The system.creds that `seedwire keys init` has made: with it the broker "
            "is told of revocations, and tells of connections that it refused."
        ),
    ] = ""
    state_dir: Annotated[
        str, Meta(description="The directory of its journal: who is enrolled, who is revoked.")
    ] = "seedwire-registrar"
    report_every_s: Annotated[
        float, Meta(gt=0, description="Seconds between two reports of its counters to telemetry.")
    ] = 5.0


def checked(settings: Settings) -> Settings:
    """
    Raises:
        ConfigError: a file that it cannot do without is not named.
    """
    for name in ("registrar_file", "creds_file", "system_creds_file"):
        if not getattr(settings, name):
            raise ConfigError(f"{name} is not set: `seedwire keys init DIR` makes the file")
    return settings
