"""The verifiers: every message that the broker stores or is handed, every write of a device's disk.

Judges by what is on the wire and on the disks alone, never by a counter or a state of what is
judged.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.folding import (
    Coefficients,
    Fields,
    Round,
    Theta,
    differ,
    indices,
    integers,
    late_term,
    of_commit,
    of_terms,
    own_term,
    unpacked,
)

PREFIX = "seedwire.v1"
EVALUATION_ROUNDS = 100


@dataclass(eq=False)
class Figures:
    """What all that measured an adapter found."""

    examples: int = 0
    correct: int = 0
    weight: int = 0
    loss: float = 0.0


@dataclass
class Job:
    """A job as the log tells it."""

    spec: Fields
    theta: Theta | None = None
    rounds: dict[int, Round] = field(default_factory=dict[int, Round])
    open: int = 0
    """0: no round is open."""
    last: int = 0
    ended: bool = False
    digests: dict[int, str] = field(default_factory=dict[int, str])
    evaluations: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])
    """(sequence of its UpdatesFolded, round) -> how often it was logged as AdapterEvaluated."""
    snapshots: list[str] = field(default_factory=list[str])
    published: int = 0
    """The round of the newest version."""
    starts: dict[int, str] = field(default_factory=dict[int, str])
    """Digests that epochs began with, by the round before them."""
    kept: list[str] = field(default_factory=list[str])
    """Blobs that epochs began with."""
    figures: dict[str, Figures] = field(default_factory=dict[str, Figures])
    """What was measured, by digest; a round that moves nothing hands them on."""
    versions: dict[str, str] = field(default_factory=dict[str, str])
    """Of the present epoch, snapshots by digest, in order."""
    at_hand: set[str] = field(default_factory=set[str])
    """Digests of what has been published, or what the epoch began with."""

    @property
    def best(self) -> list[str]:
        """Snapshots that were measured, the best first."""
        judged = [
            ((-found.correct / found.examples, found.loss / found.weight), snapshot)
            for digest, snapshot in reversed(self.versions.items())
            if (found := self.figures.get(digest)) is not None and found.weight
        ]
        return [snapshot for _, snapshot in sorted(judged, key=lambda one: one[0])]

    @property
    def unmeasured(self) -> list[str]:
        """Snapshots that were to be measured, without an answer."""
        asked = [digest for digest, found in self.figures.items() if not found.weight]
        return [self.versions[digest] for digest in asked if digest in self.versions]

    @property
    def waits(self) -> bool:
        """Whether all that is left to do is another epoch, as far as the log tells."""
        left = self.theta is not None and self.theta.epoch + 1 < self.spec["epochs"]
        return left and not (self.ended or self.open) and self.published == self.last > 0


class Witness:
    """`violations` are sentences; `now` is the virtual time."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.violations: list[str] = []
        self.jobs: dict[str, Job] = {}
        self.counted: dict[str, str] = {}
        """key -> the outcome that the log gives it."""
        self.spooled: dict[str, bytes] = {}
        """key -> what its device's disk holds for good."""
        self.published: dict[str, bytes] = {}
        self.words: dict[str, set[str]] = defaultdict(set)
        """key -> every outcome that was published for it."""
        self.sent: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.let_go: set[str] = set()
        """Keys still in a spool, or pushed out of a full one."""
        self.twice = 0
        self.lost: list[str] = []
        self.starts: dict[str, bytes] = {}
        """What the operator has put into the store for epochs to begin with, by digest."""
        self.round_opened: Callable[[str, Fields], None] = lambda job, opened: None
        self.round_closed: Callable[[str, Fields], None] = lambda job, opened: None
        self._now = now
        self._chain: dict[str, bytes] = defaultdict(bytes)
        self._length: Counter[str] = Counter()

    def wrong(self, text: str) -> None:
        """Something that must never be is."""
        self.violations.append(f"{self._now():.3f} s: {text}")

    # ---- what the broker stores

    def stored(self, stream: str, sequence: int, subject: str, data: bytes) -> None:
        """One message more in a stream."""
        if stream not in ("LOG", "DETAIL"):
            return
        self._length[stream] += 1
        if sequence != self._length[stream]:
            self.wrong(f"{stream} goes on at {sequence}, not at {self._length[stream]}")
        link = hashlib.sha256(self._chain[stream] + subject.encode() + data)
        self._chain[stream] = link.digest()
        event = unpacked(data)
        if event["type"] == "WriterStarted":
            return
        name: str = event["job"]
        if event["type"] == "JobOpened":
            if name in self.jobs and self.jobs[name].theta is not None:
                self.wrong(f"job {name} was opened twice")
            self.jobs[name] = Job(event["spec"])
            return
        job = self.jobs.get(name)
        if job is None:
            self.wrong(f"{event['type']} of job {name}, which was never opened")
            return
        if job.ended:
            self.wrong(f"{event['type']} after the end of job {name}")
        getattr(self, f"_{event['type']}")(job, event, sequence)

    def prefix(self, stream: str, messages: Mapping[int, Any]) -> None:
        """What a stream holds is what was once appended, from its first message on."""
        chain = b""
        for sequence in sorted(messages):
            one = messages[sequence]
            chain = hashlib.sha256(chain + one.subject.encode() + one.data).digest()
        if chain != self._chain[stream]:
            self.wrong(f"{stream} is not what was appended to it")

    def _EpochOpened(self, job: Job, event: Fields, _: int) -> None:
        before = job.theta
        if before is None:
            job.theta = Theta(event["manifest"])
            job.digests[0] = job.theta.digest()
        else:
            if job.open or job.published != job.last:
                self.wrong(f"an epoch opens before round {job.last} is closed and published")
            job.theta = Theta(event["manifest"], self.starts[event["start"]["digest"]])
            if (job.theta.epoch, job.theta.round) != (before.epoch + 1, before.round):
                self.wrong(f"epoch {job.theta.epoch} at {job.theta.round} after {before.epoch}")
            job.starts[job.theta.round] = job.theta.digest()
            job.kept.append(event["start"]["digest"])
        self._same(job, event, "EpochOpened")
        job.figures, job.versions, job.at_hand = {}, {}, {event["digest"]}

    def _RoundOpened(self, job: Job, event: Fields, _: int) -> None:
        if job.open or event["round"] != job.last + 1:
            self.wrong(f"round {event['round']} opens after {job.last}, open: {job.open}")
        self._same(job, event, f"RoundOpened {event['round']}")
        job.open = job.last = event["round"]
        job.rounds[job.open] = Round(event)
        if event["evaluate"]:
            job.figures.setdefault(event["digest"], Figures())
            if event["kind"] == "tune" and event["digest"] not in job.at_hand:
                self.wrong(f"round {event['round']} measures what was not published")
        self.round_opened(event["job"], event)

    def _RoundClosed(self, job: Job, event: Fields, _: int) -> None:
        number = event["round"]
        if number != job.open:
            self.wrong(f"round {number} closes, but {job.open} is open")
            return
        one, job.open = job.rounds[number], 0
        one.closed = event
        tunes = one.opened["kind"] == "tune" and event["reason"] in ("enough", "deadline")
        expected: Coefficients = dict(one.late)
        by = 0
        if tunes:
            if one.probes < job.spec["pacing"]["minimum_probes"]:
                self.wrong(f"round {number} commits {one.probes} probes, below its minimum")
            expected.update(own_term(one, job.spec["tuning"]))
            by = 1
        elif event["reason"] == "abandoned" and one.probes >= job.spec["pacing"]["minimum_probes"]:
            self.wrong(f"round {number} is abandoned with {one.probes} probes")
        commit = event["commit"]
        if why := differ(of_commit(commit) if commit else {}, expected, by=by):
            self.wrong(f"commit of round {number}: {why}")
        if job.theta is not None:
            job.theta.close(number, commit)
            job.digests[number] = job.theta.digest()
        self._same(job, event, f"RoundClosed {number}")
        if commit is None:
            before = one.opened["digest"]
            if before in job.figures:
                job.figures[event["digest"]] = job.figures[before]
            if before in job.at_hand:
                job.at_hand.add(event["digest"])
        if event["probes"] != one.probes:
            self.wrong(f"round {number} says {event['probes']} probes, the rows {one.probes}")
        self.round_closed(event["job"], one.opened)

    def _AdapterEvaluated(self, job: Job, event: Fields, _: int) -> None:
        key = (event["detail_sequence"], event["round"])
        if key not in job.evaluations:
            self.wrong(f"AdapterEvaluated {key} was made from nothing")
            return
        job.evaluations[key] += 1
        if job.evaluations[key] > 1:
            self.wrong(f"AdapterEvaluated {key} is logged twice")
        found = job.figures.get(event["digest"])
        if found is not None:  # of the epoch before, else
            found.examples += event["examples"]
            found.correct += event["correct"]
            found.weight += event["weight"]
            found.loss += event["loss"]

    def _ModelPublished(self, job: Job, event: Fields, _: int) -> None:
        if event["digest"] != job.digests.get(event["round"]):
            self.wrong(f"ModelPublished after round {event['round']} has another digest")
        job.snapshots.append(event["snapshot"]["digest"])
        job.versions[event["digest"]] = event["snapshot"]["digest"]
        job.at_hand.add(event["digest"])
        job.published = event["round"]

    def _JobEnded(self, job: Job, event: Fields, _: int) -> None:
        if job.open:
            self.wrong(f"job {event['job']} ends with round {job.open} open")
        self._same(job, event, "JobEnded")
        job.ended = True

    def _RoundReport(self, job: Job, event: Fields, _: int) -> None:
        one = job.rounds.get(event["round"])
        if one is None or one.closed is None or one.reports:
            self.wrong(f"RoundReport {event['round']} is early, or not the first")
        else:
            one.reports += 1

    def _UpdatesFolded(self, job: Job, event: Fields, sequence: int) -> None:
        number = event["round"]
        if number != job.open:
            self.wrong(f"UpdatesFolded for round {number}, but {job.open} is open: never counted")
            return
        one = job.rounds[number]
        sums: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
        late: Coefficients = defaultdict(int)
        late_sums = 0
        for row in event["updates"]:
            update = self._update(job, event, row)
            if update is None:
                continue
            result = update["result"]
            if result["kind"] == "evaluate":
                job.evaluations[sequence, row["round"]] = 0
            elif row["outcome"] == "late":
                late_sums += 1
                for key, value in late_term(
                    job.rounds[row["round"]], result, number - row["round"]
                ).items():
                    late[key] += value
            else:
                self._count(one, result, sums)
        if why := differ(of_terms(event["late"]), late, by=late_sums):
            self.wrong(f"late terms at DETAIL {sequence}: {why}")
        for key, value in of_terms(event["late"]).items():
            one.late[key] += value
        self._same_sums(event, sums, sequence)

    def _update(self, job: Job, event: Fields, row: Fields) -> Fields | None:
        """The update behind a row, as its device wrote it."""
        key = f"{event['job']}.{event['epoch']}.{row['round']}.{row['device']}.{row['part']}"
        if key in self.counted:
            self.twice += 1
            self.wrong(f"{key} is counted twice")
        self.counted[key] = row["outcome"]
        if key not in self.spooled:
            self.wrong(f"{key} is counted, but no device ever had it on its disk")
            return None
        update = unpacked(self.spooled[key])
        measured = job.rounds.get(row["round"])
        if measured is None or update["digest"] != measured.opened["digest"]:
            self.wrong(f"{key} was measured at another adapter than its round opened at")
            return None
        if row["outcome"] == "late" and measured.frozen is None:
            self.wrong(f"{key} is late for a round that closed without a commit")
        if (row["outcome"] == "late") != (row["round"] != job.open) and row["kind"] == "probe":
            self.wrong(f"{key} is {row['outcome']} while round {job.open} is open")
        lateness = job.spec["pacing"]["lateness_rounds"]
        if row["kind"] == "probe" and job.open - row["round"] > lateness:
            self.wrong(f"{key} is counted past the lateness bound")
        return update

    def _count(self, one: Round, result: Fields, sums: dict[int, list[int]]) -> None:
        numbers = integers(result["differences"], 4)
        bends = integers(result["bends"], 4) or [0] * len(numbers)
        for j, number, bend in zip(indices(result["ranges"]), numbers, bends, strict=True):
            one.differences[j] += number
            one.weights[j] += result["weight"]
            sums[j][0] += number
            sums[j][1] += result["weight"]
            sums[j][2] += bend
            one.probes += 1

    def _same_sums(self, event: Fields, sums: dict[int, list[int]], sequence: int) -> None:
        logged: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
        for part in event["sums"]:
            first, count = part["span"]
            weights = integers(part["weights"], 8)
            columns = (
                integers(part["differences"], 8),
                weights * count if len(weights) == 1 else weights,
                integers(part["bends"], 8) or [0] * count,
            )
            for place, column in enumerate(columns):
                for j, value in enumerate(column, first):
                    logged[j][place] += value
        for j in sorted({*logged, *sums}):
            if logged[j] != sums[j]:
                self.wrong(f"DETAIL {sequence}, direction {j}: {logged[j]}, not {sums[j]}")
                return

    def _same(self, job: Job, event: Fields, what: str) -> None:
        mine = job.theta.digest() if job.theta is not None else ""
        if event["digest"] != mine:
            theirs = event["digest"][:12]
            self.wrong(f"{what} of job {event['job']}: digest {theirs}, not {mine[:12]}")

    # ---- what is published

    def said(self, subject: str, data: bytes) -> None:
        """One message handed to the broker."""
        kind = subject.split(".")[2]
        if kind == "update":
            self._sent(unpacked(data), data)
        elif kind == "settled":
            event = unpacked(data)
            self._settled(event["key"], event["outcome"], event.get("reason", ""))
        elif kind == "report":
            self._reported(unpacked(data))

    def _sent(self, update: Fields, data: bytes) -> None:
        key = text_of(update["key"])
        self.sent[key] += 1
        if self.published.setdefault(key, data) != data:
            self.wrong(f"{key} was sent with two contents")
        if self.spooled.get(key) != data:
            self.wrong(f"{key} was sent before it was on disk for good")

    def _settled(self, key: str, outcome: str, reason: str) -> None:
        self.words[key].add(outcome)
        self.outcomes[outcome] += 1
        if outcome in ("folded", "late", "duplicate"):
            if key not in self.counted:
                self.wrong(f"{key} is settled as {outcome}, but the log does not have it")
            elif outcome != "duplicate" and self.counted[key] != outcome:
                self.wrong(f"{key} is settled as {outcome}, logged as {self.counted[key]}")
        elif outcome == "rejected":
            self.wrong(f"{key} of an honest device is rejected: {reason}")
        elif why := self._in_time(key):
            self.wrong(f"{key} is settled as too late, but {why} ({reason})")

    def _in_time(self, key: str) -> str:
        """Why an update is not too late; empty if it is."""
        name, epoch, number, _, _ = key.split(".")
        job, measured = self.jobs[name], int(number)
        if job.ended or not job.open or (job.theta is not None and int(epoch) < job.theta.epoch):
            return ""
        one = job.rounds[measured]
        age = job.open - measured
        if key in self.spooled and unpacked(self.spooled[key])["result"]["kind"] == "evaluate":
            return f"evaluations {age} rounds old are welcome" if age <= EVALUATION_ROUNDS else ""
        if age <= job.spec["pacing"]["lateness_rounds"] and key in self.counted:
            return "it was counted: a duplicate"
        if age > job.spec["pacing"]["lateness_rounds"]:
            return ""
        if job.rounds[job.open].opened["kind"] == "evaluate" and age:
            return ""
        if age and one.frozen is None:
            return ""
        return f"its round is {age} rounds old"

    def _reported(self, report: Fields) -> None:
        for name, position in report["positions"].items():
            number, digest = position.split(":")
            job = self.jobs[name]
            if digest not in (job.digests.get(int(number)), job.starts.get(int(number))):
                self.wrong(f"{report['device']} stands at {position[:20]} of job {name}")

    # ---- what devices write

    def durable(self, name: str, data: bytes) -> None:
        """A file of a device's spool outlives a power cut from now on."""
        if name.endswith(".bad"):
            self.wrong(f"a torn update was found: {name}")
        if not name.endswith(".update"):
            return
        key = name.removesuffix(".update")
        # What was rolled back before it was ever sent may be measured anew.
        if key in self.published and self.spooled[key] != data:
            self.wrong(f"{key} was written with two contents")
        self.spooled[key] = data

    # ---- at the end

    def ledger(self, device: str, data: bytes, held: list[str]) -> None:
        """What a device's ledger says is what the log says; nothing is missing."""
        spooled: set[str] = set()
        outcome: dict[str, str] = {}
        for line in data.splitlines():
            fact = json.loads(line)
            if fact["what"] == "spooled":
                spooled.add(fact["key"])
                self._same_fact(fact)
            else:
                outcome.setdefault(fact["key"], fact.get("outcome", fact["what"]))
        self.let_go.update(held, (key for key in outcome if outcome[key] == "superseded"))
        for key, word in sorted(outcome.items()):
            if word in ("folded", "late", "duplicate") and key not in self.counted:
                self.wrong(f"{device} was told that {key} is {word}; the log does not have it")
            if word == "too_late" and "too_late" not in self.words[key]:
                self.wrong(f"{device} holds {key} for too late; nobody said so")
        mine = {key for key in self.published if key.split(".")[3] == device}
        for key in sorted(spooled | mine):
            if key not in self.counted and key not in outcome and key not in held:
                self.lost.append(key)
                self.wrong(f"{key} is lost: spooled, neither settled nor still in the spool")
        for key in sorted(mine - spooled):
            self.wrong(f"{key} was sent, but the ledger of {device} does not know it")

    def _same_fact(self, fact: Fields) -> None:
        if fact["key"] not in self.spooled:
            self.wrong(f"the ledger has {fact['key']}, the disk never had")
            return
        result = unpacked(self.spooled[fact["key"]])["result"]
        total = sum(integers(result["differences"], 4)) if "differences" in result else None
        if (fact["sum"], fact["weight"]) != (total, result["weight"]):
            self.wrong(f"the ledger's line of {fact['key']} is not of its update")

    def finished(self) -> None:
        """All jobs have ended, and every fact of theirs is there."""
        for name, job in self.jobs.items():
            if not job.ended:
                self.wrong(f"job {name} did not end: round {job.last}, open: {job.open}")
                continue
            for number, one in job.rounds.items():
                if one.closed is None or one.reports != 1:
                    self.wrong(f"round {number} of job {name} has {one.reports} reports")
            for key, times in job.evaluations.items():
                if times != 1:
                    self.wrong(f"the evaluation {key} is logged {times} times")
        for key in sorted(self.published.keys() - self.words.keys() - self.let_go):
            if key not in self.counted:
                self.wrong(f"{key} was sent and never settled")


def text_of(key: Fields) -> str:
    parts = (key["job"], key["epoch"], key["round"], key["device"], key["part"])
    return ".".join(str(part) for part in parts)
