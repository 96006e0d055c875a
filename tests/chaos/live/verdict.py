"""What a schedule of real processes has come to, judged from streams, disks and wires alone."""

import json
from collections.abc import Iterable
from pathlib import Path

from shared.codec import decode
from shared.messages import EpochOpened, JobEnded, LogEvent, Message
from tests.chaos.folding import unpacked
from tests.chaos.live.recording import Copy, Heard, Recorder
from tests.chaos.witness import Witness
from tests.support.jobs import adapter_after

GRACE_S = 20.0
"""Over its deadline a round may be open so long on a busy machine."""
SECOND_NS = 1_000_000_000


def judged(
    witness: Witness,
    final: Copy,
    copies: Iterable[Copy],
    recorder: Recorder,
    kept: Iterable[Path],
    spools: dict[str, Path],
) -> None:
    """`witness` has seen everything: streams in the order of their times, then disks.

    `copies` are of the streams as they were at each kill, `kept` the directories that hold every
    update that ever was on a disk for good, `spools` each device's spool.
    """
    _prefixes(witness, final, copies, recorder)
    for directory in kept:
        for path in sorted(directory.glob("*")):
            witness.durable(path.name, path.read_bytes())
    stored = [(entry.at_ns, 0, name, entry) for name, found in final.items() for entry in found]
    said = [(heard.at_ns, 1, "", heard) for heard in recorder.heard]
    for _, _, stream, one in sorted([*stored, *said], key=lambda each: each[:2]):
        if isinstance(one, Heard):
            witness.said(one.subject, one.data)
        else:
            witness.stored(stream, one.sequence, one.subject, one.data)
    for device, spool in spools.items():
        _spool(witness, device, spool)
    witness.finished()
    _replayed(witness, final)


def _prefixes(witness: Witness, final: Copy, copies: Iterable[Copy], recorder: Recorder) -> None:
    """Whatever the broker has shown is there still, in its place."""
    for copy in copies:
        for stream, entries in copy.items():
            if final[stream][: len(entries)] != entries:
                witness.wrong(f"{stream} before a kill is no prefix of what it is after")
    log = {entry.sequence: entry.data for entry in final["LOG"]}
    for sequence, data in recorder.facts.items():
        if log.get(sequence) != data:
            witness.wrong(f"LOG {sequence} was told to the world, and is not what is stored")


def _spool(witness: Witness, device: str, spool: Path) -> None:
    ledger = spool / "ledger.jsonl"
    held = [path.name.removesuffix(".update") for path in spool.glob("*.update")]
    if held:
        witness.wrong(f"{device} still holds {held}: never settled")
    data = ledger.read_bytes() if ledger.exists() else b""
    for line in data.splitlines():
        fact = json.loads(line)
        if fact.get("what") == "settled":  # the recorder may have been cut off when it was said
            witness.words[fact["key"]].add(fact["outcome"])
    witness.ledger(device, data, held)


def _replayed(witness: Witness, final: Copy) -> None:
    """The system's own replay of each job ends at the digest that its end names."""
    events: dict[str, list[LogEvent]] = {}
    for entry in final["LOG"]:
        message = decode(entry.data, Message)
        if isinstance(message, LogEvent):
            events.setdefault(message.job, []).append(message)
    for job, found in events.items():
        opened = next(event for event in found if isinstance(event, EpochOpened))
        digest = adapter_after(opened.manifest, found).digest()
        if isinstance(found[-1], JobEnded) and found[-1].digest != digest:
            witness.wrong(f"a replay of job {job} ends at {digest[:12]}")


def longest_over_s(final: Copy, outages: list[tuple[int, int]]) -> float:
    """The most that a round was open over its deadline, from its opening or the last outage.

    An outage is a time in which aggregator, broker or the link between them was not there; it
    lasts until the next aggregator has claimed the log, where it had one die.
    """
    worst = 0
    opened: dict[tuple[str, int], tuple[int, int]] = {}
    claims = [entry.at_ns for entry in final["LOG"] if entry.subject.endswith("=writer")]
    for entry in final["LOG"]:
        event = unpacked(entry.data)
        key = (event.get("job", ""), event.get("round", 0))
        if event["type"] == "RoundOpened":
            opened[key] = (entry.at_ns, int(event["deadline_s"] * SECOND_NS))
        elif event["type"] == "RoundClosed":
            began, deadline = opened[key]
            ends = [end for _, end in outages if began <= end <= entry.at_ns]
            ends += [claim for claim in claims if began <= claim <= entry.at_ns]
            worst = max(worst, entry.at_ns - max([began, *ends]) - deadline)
    return worst / SECOND_NS
