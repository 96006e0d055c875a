"""Every counter there is, with a sentence, and the object that counts them in one process.

Processes report their counters over the bus; telemetry alone turns them into Prometheus metrics,
so that a device needs no port and no library for it.
"""

from collections.abc import Mapping

COUNTERS: dict[str, str] = {
    "messages_malformed": "Messages refused: not MessagePack, or not of their schema.",
    "messages_failed": "Messages whose handling raised a bug; they are tried again.",
    "updates_folded": "Updates counted in the round they were measured for.",
    "updates_late": "Updates counted as a late term of a later close.",
    "updates_duplicate": "Updates that came again; settled, without effect.",
    "updates_too_late": "Updates older than the lateness bound; settled, without effect.",
    "updates_rejected": "Updates that cannot be used: unknown job, other adapter, wrong form.",
    "rounds_closed": "Rounds closed, for whatever reason.",
    "rounds_abandoned": "Rounds closed below their minimum, without moving the adapter.",
    "jobs_refused": "Jobs refused when they were submitted.",
    "log_appends": "Events appended to the log.",
    "appends_failed": "Appends that the broker refused or did not answer; they are tried again.",
    "work_assigned": "Pieces of work given to devices.",
    "work_declined": "Pieces of work that a device could not do.",
    "comebacks": "Requests for work answered with a time to come back.",
    "wakeups": "Devices called because there is work.",
    "rows_refused": "Rows of private data that could not be used.",
    "probes_dropped": "Probes left out because they were not finite or too large.",
    "tokens_forward": "Tokens sent forward through the model.",
    "updates_sent": "Updates sent, repeats included.",
    "updates_measured": "Updates measured and put in the spool.",
    "updates_superseded": "Spooled updates dropped because their job ended or moved on.",
    "spool_full": "Updates that could not be put in the spool.",
    "engine_deaths": "Times the engine's process ended in the middle of its work.",
    "engine_refusals": "Pieces of work that the engine refused.",
    "model_downloads": "Models fetched whole.",
    "model_resumes": "Downloads that went on where an earlier one broke off.",
    "catch_up_replays": "Times a device caught up by replaying the log.",
    "catch_up_snapshots": "Times a device caught up by a snapshot.",
    "digest_mismatches": "Times a device's adapter did not have the log's digest.",
    "connections_refused": "Connections and enrolments refused: a foreign, revoked or no identity.",
    "devices_enrolled": "Devices given an identity.",
    "devices_revoked": "Devices put out by an operator.",
    "reconnects": "Times the link to the broker came back.",
    "link_bytes_in": "Bytes of messages that came from the broker, without the protocol's own.",
    "link_bytes_out": "Bytes of messages sent to the broker, without the protocol's own.",
    "deliveries_dropped": "Messages dropped because a queue was full.",
}


class Counters:
    """Counts of one process. A name that is not in COUNTERS is a bug."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, name: str, amount: int = 1) -> None:
        if name not in COUNTERS:
            raise KeyError(f"no counter is called {name}")
        if amount:
            self._counts[name] = self._counts.get(name, 0) + amount

    def put(self, name: str, amount: int) -> None:
        """Set a count that is kept elsewhere, such as the bus's reconnects."""
        if amount:
            self._counts[name] = amount

    def snapshot(self) -> Mapping[str, int]:
        return dict(self._counts)

    def get(self, name: str) -> int:
        return self._counts.get(name, 0)
