"""Whose fault it is, and so what becomes of the message.

    SeedwireError
      ConfigError          the operator: exit 78, no restart
        Fenced             another process writes the log that this one owned
      TransientError       the world: try again after `delay_s`
      RejectError          the peer: settle as rejected, count, go on
        MalformedMessage   not MessagePack, or not of its schema
        InvalidUpdate      decodes, but cannot be used
        StaleMessage       late or repeated: normal
      EngineError          the engine could not do one piece of work
        EngineDied         the engine's process ended in the middle of it

Anything else is a bug: logged with its traceback, counted, tried again.
"""


class SeedwireError(Exception):
    """Root of every error this project raises on purpose."""


class ConfigError(SeedwireError):
    """The operator gave something that cannot work; the text names it and the mend."""


class Fenced(ConfigError):
    """Another aggregator has written to the log; this one must stop."""


class TransientError(SeedwireError):
    """The world failed for now; the same call may succeed after `delay_s`."""

    def __init__(self, text: str, *, delay_s: float = 1.0) -> None:
        super().__init__(text)
        self.delay_s = delay_s


class RejectError(SeedwireError):
    """The peer sent something that cannot be accepted, now or later."""


class MalformedMessage(RejectError):
    """Bytes that are not MessagePack, or not of the schema of their subject."""


class InvalidUpdate(RejectError):
    """An update that decodes but cannot be used: its text says why."""


class StaleMessage(RejectError):
    """Too late or repeated; duplicates are normal."""


class EngineError(SeedwireError):
    """The engine refused or failed one piece of work; the text names it and the mend."""


class EngineDied(EngineError):
    """The engine's process ended before it answered."""
