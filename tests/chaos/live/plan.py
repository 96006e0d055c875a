"""What goes wrong in a schedule of real processes, drawn from its seed before anything runs."""

import random
from dataclasses import dataclass, field
from typing import Literal

from tests.chaos.live.boundaries import NAMES
from tests.chaos.live.wire import TROUBLES, Trouble

Kind = Literal["kill", "freeze", "terminate", "second_aggregator", "unplug", "netem"] | Trouble

MEAN_BOUNDARIES = 14
"""Near the start of a life lie the boundaries of its replay and of its first round."""
MEAN_REPEATS = 2
DRAWN = ("broker", "kill", "freeze", "terminate", "rival", "cable", "link", "link", "link", "link")
"""What a blow may be, each as likely as the next."""


@dataclass(frozen=True)
class Blow:
    """One thing done from outside to a process or its link, `at_s` after the job has begun."""

    kind: Kind
    who: str
    at_s: float
    for_s: float

    def text(self) -> str:
        return f"{self.kind} {self.who} at {self.at_s:.2f} s for {self.for_s:.2f} s"


@dataclass(frozen=True)
class Plan:
    """A schedule: the fleet, its job, at which boundary each life ends, and the blows."""

    seed: int
    devices: tuple[str, ...]
    how: Literal["exact", "probe"]
    rounds: int
    deadline_s: float
    enough_devices: int
    lateness_rounds: int
    momentum: int
    batch: int
    snapshot_every: int
    delay_s: float
    """What a pass of the engine takes."""
    kills: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """By process: the boundary at which each of its first lives ends, as a Switch has it."""
    blows: tuple[Blow, ...] = ()
    mutation: dict[str, str] = field(default_factory=dict[str, str])
    """By process: a promise that it breaks, for a test of the verifier."""

    def text(self) -> list[str]:
        kills = [f"{who} ends at {', '.join(at)}" for who, at in self.kills.items() if at]
        return [*kills, *(blow.text() for blow in self.blows)]


def a_plan(seed: int) -> Plan:
    """The plan of a seed."""
    chance = random.Random(f"{seed} live")
    devices = tuple(f"d{number}" for number in range(chance.choice([2, 3, 3])))
    how: Literal["exact", "probe"] = chance.choice(["exact", "probe"])
    everyone = ["aggregator", "scheduler", *devices]
    kills: dict[str, tuple[str, ...]] = {}
    for number, who in enumerate(everyone):
        program = who if who in NAMES else "edge"
        lives = chance.choice([1, 2, 3] if who == "aggregator" else [0, 1, 1, 2])
        # One by one over the seeds: no boundary is left to chance.
        swept = f"{NAMES[program][(seed + 5 * number) % len(NAMES[program])]}:{_repeat(chance)}"
        others = (_boundary(chance, program) for _ in range(lives))
        kills[who] = (swept, *others) if lives else ()
    return Plan(
        seed=seed,
        devices=devices,
        how=how,
        rounds=chance.randint(5, 8),
        deadline_s=chance.choice([1.5, 2.5]),
        enough_devices=chance.randint(1, len(devices)),
        lateness_rounds=chance.choice([1, 2, 4]),
        momentum=chance.choice([0, 0, 200]),
        batch=chance.choice([1, 3, 256]),
        snapshot_every=chance.choice([1, 2, 50]),
        delay_s=chance.choice([0.0, 0.01]),
        kills=kills,
        blows=tuple(sorted(_blows(chance, everyone), key=lambda blow: blow.at_s)),
    )


def _repeat(chance: random.Random) -> int:
    return 1 + int(chance.expovariate(1 / MEAN_REPEATS))


def _boundary(chance: random.Random, program: str) -> str:
    if chance.random() < 0.5:
        return f"{chance.choice(NAMES[program])}:{_repeat(chance)}"
    return str(1 + int(chance.expovariate(1 / MEAN_BOUNDARIES)))


def _blows(chance: random.Random, everyone: list[str]) -> list[Blow]:
    made: list[Blow] = []
    for _ in range(chance.randint(2, 5)):
        at_s = chance.uniform(0.1, 4.5)
        match chance.choice(
            ["broker", "kill", "freeze", "terminate", "rival", "cable", *["link"] * 4]
        ):
            case "broker":
                made.append(Blow("kill", "broker", at_s, chance.uniform(0, 1)))
            case "kill":
                made.append(Blow("kill", chance.choice(everyone), at_s, chance.uniform(0, 1)))
            case "freeze":
                made.append(Blow("freeze", chance.choice(everyone), at_s, chance.uniform(0.5, 2)))
            case "terminate":
                made.append(Blow("terminate", chance.choice(everyone), at_s, 0.0))
            case "rival":
                made.append(Blow("second_aggregator", "rival", at_s, 0.0))
            case "cable":
                kind: Kind = chance.choice(["unplug", "netem"])
                made.append(Blow(kind, everyone[-1], at_s, chance.uniform(0.5, 3)))
            case _:
                trouble = chance.choice(TROUBLES)
                for_s = chance.uniform(0.3, 2.5)
                made.append(Blow(trouble, chance.choice(everyone), at_s, for_s))
    rivals = [blow for blow in made if blow.kind == "second_aggregator"]
    return [blow for blow in made if blow not in rivals[1:]]
