"""What goes wrong in a schedule: a plan of faults, drawn from a seed before anything runs.

Each fault has chances of its own, so leaving one out changes no other: that is how a plan shrinks.
"""

import random
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "kill",
    "power_cut",
    "terminate",
    "partition",
    "drop",
    "duplicate",
    "delay",
    "reorder",
    "append_lost",
    "append_unanswered",
    "ack_lost",
    "call_failed",
    "broker_restart",
    "second_aggregator",
    "engine_death",
    "disk_full",
    "slow_engine",
    "clock",
    "stop_job",
]

MIX = ("kill",) * 3 + ("cut", "world", "odd", "failover") + ("window", "stream") * 2
"""What a fault of a schedule may be, each as likely as the next."""

MINUTE_S, HOUR_S, DAY_S = 60.0, 3600.0, 86_400.0


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong. `at_step` counts the write boundaries of process `who`."""

    number: int
    kind: Kind
    who: str
    at_s: float = 0.0
    at_step: int = 0
    for_s: float = 0.0
    share: float = 0.0

    def random(self, seed: int) -> random.Random:
        """This fault's own chances."""
        return random.Random(f"{seed} fault {self.number}")

    def text(self) -> str:
        where = f"step {self.at_step}" if self.at_step else f"{self.at_s:.3f} s"
        words = [f"#{self.number} {self.kind} {self.who} at {where}"]
        if self.for_s:
            words.append(f"for {self.for_s:.3f} s")
        if self.share:
            words.append(f"share {self.share:.2f}")
        return ", ".join(words)


@dataclass(frozen=True)
class Scenario:
    """What runs: the fleet, its jobs, and what goes wrong."""

    seed: int
    devices: int
    trusted: int
    jobs: int
    rounds: int
    directions: int
    enough_probes: int
    enough_devices: int
    minimum_probes: int
    deadline_s: float
    lateness_rounds: int
    momentum: int
    normalise: Literal["none", "rms"]
    evaluate_every: int
    snapshot_every: int
    batch: int
    spool_updates: int
    """How many updates fit the spool of the tightest device; 0: all."""
    ledger_bytes: int
    """Past this a device's ledger is trimmed; 0: never."""
    probe_s: tuple[float, ...]
    """What a direction takes each device."""
    faults: list[Fault] = field(default_factory=list[Fault])

    @property
    def names(self) -> list[str]:
        return [f"d{number}" for number in range(self.devices)]


def scenario(seed: int) -> Scenario:
    """The scenario of a seed."""
    chance = random.Random(f"{seed} scenario")
    devices = chance.randint(2, 4)
    directions = chance.choice([8, 16, 24])
    deadline_s = chance.choice([10.0, 20.0, 60.0])
    enough = chance.choice([directions // 2, directions, 2 * directions])
    found = Scenario(
        seed=seed,
        devices=devices,
        trusted=chance.randint(0, 1),
        jobs=1 if chance.random() < 0.8 else 2,
        rounds=chance.randint(2, 5),
        directions=directions,
        enough_probes=enough,
        enough_devices=chance.randint(1, devices),
        minimum_probes=chance.choice([1, 1, enough // 2]) or 1,
        deadline_s=deadline_s,
        lateness_rounds=chance.choice([0, 1, 2, 4]),
        momentum=chance.choice([0, 0, 200]),
        normalise=chance.choice(["none", "rms"]),
        evaluate_every=chance.choice([0, 1, 2]),
        snapshot_every=chance.choice([1, 2, 50]),
        batch=chance.choice([1, 3, 256]),
        spool_updates=chance.choice([0, 0, 2]),
        ledger_bytes=chance.choice([0, 300]),
        probe_s=tuple(chance.choice([0.01, 0.05, 0.3, deadline_s / 8]) for _ in range(devices)),
    )
    found.faults.extend(_faults(found, chance))
    return found


def _faults(found: Scenario, chance: random.Random) -> list[Fault]:
    services = ["aggregator", "scheduler"]
    everyone = [*services, *found.names]
    made: list[Fault] = []

    def add(kind: Kind, who: str, **more: float) -> None:
        at_s = more.pop("at_s", chance.uniform(0, 4 * found.deadline_s))
        step = int(more.pop("at_step", 0))
        made.append(Fault(len(made), kind, who, 0.0 if step else at_s, step, **more))

    for _ in range(chance.choice([0, 1, 2, 3, 5, 8])):
        match chance.choice(MIX):
            case "kill":
                who = chance.choice([*everyone, "aggregator", "aggregator"])
                kinds: list[Kind] = ["kill", "kill", "power_cut"] if who[0] == "d" else ["kill"]
                reach = 250 if who == "aggregator" else 60 if who == "scheduler" else 120
                down_s = chance.choice([0.5, 3.0, MINUTE_S])
                add(chance.choice(kinds), who, at_step=chance.randint(1, reach), for_s=down_s)
            case "cut":
                add("partition", chance.choice(everyone), for_s=_length(chance))
            case "window":
                kind: Kind = chance.choice(["drop", "duplicate", "delay", "reorder"])
                share = chance.choice([0.1, 0.3, 0.9])
                add(kind, chance.choice(everyone), for_s=chance.uniform(1, 60), share=share)
            case "stream":
                kind = chance.choice(
                    ["append_lost", "append_unanswered", "ack_lost", "call_failed"]
                )
                share = chance.choice([0.2, 0.5, 0.9])
                who = "aggregator" if kind != "call_failed" else chance.choice(everyone)
                add(kind, who, for_s=chance.uniform(1, 40), share=share)
            case "world":
                kind = chance.choice(
                    ["broker_restart", "broker_restart", "second_aggregator", "stop_job"]
                )
                add(kind, {"broker_restart": "broker", "stop_job": "job-0"}.get(kind, "rival"))
            case "failover":  # the first seems to hang, so somebody starts another
                at_s = chance.uniform(0, 3 * found.deadline_s)
                hang_s = chance.uniform(0, 2 * found.deadline_s)
                add("partition", "aggregator", at_s=at_s, for_s=hang_s)
                other_s = at_s + chance.uniform(-2, 1) + chance.uniform(0, hang_s)
                add("second_aggregator", "rival", at_s=max(0.0, other_s))
            case _:
                kind = chance.choice(
                    ["engine_death", "disk_full", "slow_engine", "terminate", "clock"]
                )
                who = chance.choice(found.names)
                if kind == "terminate":
                    who = chance.choice(everyone)
                step = chance.randint(1, 20) if kind == "engine_death" else 0
                length = chance.uniform(1, 3 * found.deadline_s)
                if kind == "clock":
                    length = chance.uniform(-5, 5) * HOUR_S
                add(kind, who, at_step=step, for_s=length)
    return made


def _length(chance: random.Random) -> float:
    """From a second to a day; most are short."""
    dice = chance.random()
    if dice < 0.75:
        return chance.uniform(1, 2 * MINUTE_S)
    if dice < 0.97:
        return chance.uniform(2 * MINUTE_S, HOUR_S)
    return chance.uniform(HOUR_S, DAY_S)
