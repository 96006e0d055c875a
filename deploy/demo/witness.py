"""An independent witness: counts from the devices' ledgers and the broker's log, with no part of
the system it judges (plain nats-py, msgpack and json).

A device's ledger says which updates it measured and the sum of the numbers in each. DETAIL says
which updates were counted, and the sums of what was. Nothing may be missing, nothing be twice.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import nats

Event = dict[str, Any]


@dataclass
class Verdict:
    """What was found. `lost`: measured, never settled and not in the log."""

    measured: int = 0
    counted: int = 0
    late: int = 0
    lost: list[str] = field(default_factory=list[str])
    twice: list[str] = field(default_factory=list[str])
    wrong_rounds: list[int] = field(default_factory=list[int])
    rounds: int = 0
    final_digest: str = ""

    @property
    def clean(self) -> bool:
        return not (self.lost or self.twice or self.wrong_rounds)


async def examine(url: str, job: str, ledgers: list[Path], **login: Any) -> Verdict:
    """Read everything once and say what became of each update of `job`.

    `login` is what nats-py is told besides the address.
    """
    client = await nats.connect(url, **login)
    try:
        log = await _stream(client, "LOG", f"seedwire.v1.log.{job}")
        detail = await _stream(client, "DETAIL", f"seedwire.v1.detail.{job}")
    finally:
        await client.close()
    sums, outcomes = _ledgers(ledgers, job)
    folded = [event for event in detail if event["type"] == "UpdatesFolded"]
    rows = [(event, row) for event in folded for row in event["updates"]]
    keys = Counter(
        f"{job}.{event['epoch']}.{row['round']}.{row['device']}.{row['part']}"
        for event, row in rows
    )
    closes = [event for event in log if event["type"] == "RoundClosed"]
    verdict = Verdict(measured=len(sums), counted=sum(keys.values()))
    verdict.late = sum(row["outcome"] == "late" for _, row in rows)
    verdict.twice = [key for key, times in keys.items() if times > 1]
    verdict.lost = [key for key in sums if key not in keys and key not in outcomes]
    # A device may hear "folded" only of what the log has.
    verdict.lost += [
        key
        for key, word in outcomes.items()
        if word in ("folded", "late", "duplicate") and key not in keys
    ]
    verdict.wrong_rounds = _wrong_rounds(job, folded, sums)
    verdict.lost += _late_without_commit(folded, closes)
    verdict.rounds = sum(event["commit"] is not None for event in closes)
    verdict.final_digest = next(
        (event["digest"] for event in reversed(log) if event["type"] == "JobEnded"), ""
    )
    return verdict


def _late_without_commit(folded: list[Event], closes: list[Event]) -> list[str]:
    """Late terms that the log took in, but the close of the round they came in did not commit."""
    committed = {
        (close["round"], term["stream_round"])
        for close in closes
        for term in (close["commit"] or {"terms": []})["terms"]
    }
    closed = {close["round"] for close in closes}
    return [
        f"late term of stream round {term['stream_round']} in round {event['round']}"
        for event in folded
        for term in event["late"]
        if event["round"] in closed and (event["round"], term["stream_round"]) not in committed
    ]


def _wrong_rounds(job: str, folded: list[Event], sums: dict[str, int | None]) -> list[int]:
    """Rounds whose logged sums are not those of the updates that the log says it counted."""
    logged: Counter[int] = Counter()
    expected: Counter[int] = Counter()
    for event in folded:
        for part in event["sums"]:
            data = part["differences"]
            logged[event["round"]] += sum(
                int.from_bytes(data[at : at + 8], "little", signed=True)
                for at in range(0, len(data), 8)
            )
        for row in event["updates"]:
            if row["outcome"] == "folded" and row["kind"] == "probe":
                key = f"{job}.{event['epoch']}.{row['round']}.{row['device']}.{row['part']}"
                expected[event["round"]] += sums.get(key) or 0
    return sorted(number for number in logged | expected if logged[number] != expected[number])


def _ledgers(paths: list[Path], job: str) -> tuple[dict[str, int | None], dict[str, str]]:
    """By key: the sum of its numbers, and the last word that its device heard of it."""
    sums: dict[str, int | None] = {}
    outcomes: dict[str, str] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                fact = json.loads(line)
            except ValueError:
                continue  # a kill tore the last line; its update was not spooled
            if not str(fact["key"]).startswith(job + "."):
                continue
            if fact["what"] == "spooled":
                sums[fact["key"]] = fact["sum"]
            else:
                outcomes.setdefault(fact["key"], fact.get("outcome", fact["what"]))
    return sums, outcomes


async def _stream(client: Any, stream: str, subject: str) -> list[Event]:
    """All messages of a subject, one Direct Get each: slow, and simple enough to be believed."""
    context = client.jetstream()
    state = (await context.stream_info(stream)).state
    events: list[Event] = []
    for sequence in range(state.first_seq or 1, state.last_seq + 1):
        stored = await context.get_msg(stream, sequence, direct=True)
        if stored.subject == subject:
            events.append(msgpack.unpackb(stored.data))
    return events
