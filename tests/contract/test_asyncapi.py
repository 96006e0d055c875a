"""The AsyncAPI document: it is valid, it is what the sources say, and real traffic conforms."""

import asyncio
import inspect
import json
import re
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from jsonschema import Draft7Validator, ValidationError, validators
from msgspec.structs import replace

from deploy.demo.processes import ROOT
from shared import asyncapi, subjects
from shared.bus import Delivery
from shared.codec import encode
from shared.message_schemas import BINARY
from shared.messages import (
    Evaluation,
    JobSpec,
    ListDevices,
    ListJobs,
    Message,
    Pacing,
    StopJob,
    Tuning,
)
from shared.nats_bus import NatsBus, connect
from tests.support.fleet import Fleet, a_fleet, a_task
from tests.support.waiting import wait_until

COMMITTED = ROOT / "deploy" / "contract" / "asyncapi.json"
SPECIFICATION = COMMITTED.parent / "node_modules/@asyncapi/specs/schemas/3.0.0.json"
DOCUMENT = asyncapi.document()


def test_the_committed_document_is_what_the_sources_say() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == asyncapi.text(), (
        f"the messages or subjects have changed: run `{asyncapi.COMMAND}`"
    )


def test_the_document_is_valid_asyncapi() -> None:
    if not SPECIFICATION.is_file():
        pytest.skip("AsyncAPI's own schema is not here: run `npm ci` in deploy/contract")
    specification = json.loads(SPECIFICATION.read_text(encoding="utf-8"))
    found = [
        f"{error.json_path}: {error.message}"
        for error in Draft7Validator(specification).iter_errors(DOCUMENT)
    ]
    assert found == []


def test_every_reference_leads_somewhere() -> None:
    references = re.findall(r'"\$ref": "#/([^"]+)"', asyncapi.text())
    assert len(references) > 100
    for reference in set(references):
        found: Any = DOCUMENT
        for part in reference.split("/"):
            assert part in found, reference
            found = found[part]


def test_every_subject_and_every_message_is_in_it() -> None:
    addresses = {channel["address"] for channel in DOCUMENT["channels"].values()}
    for name, value in vars(subjects).items():
        if isinstance(value, str) and value.startswith(f"{subjects.PREFIX}."):
            made = value if "*" not in value else None  # a wildcard over others
        elif inspect.isfunction(value) and name != "last_token":
            names = inspect.signature(value).parameters
            made = value(*(f"{{{parameter}}}" for parameter in names))
            assert value.__doc__, f"subjects.{name} needs a docstring: it is the channel's text"
        else:
            continue
        assert made is None or made in addresses, f"subjects.{name} has no row in CHANNELS"
    carried = {name for channel in DOCUMENT["channels"].values() for name in channel["messages"]}
    assert {kind.__name__ for kind in Message.__subclasses__()} <= carried
    assert all(channel["description"] for channel in DOCUMENT["channels"].values())


def test_all_bytes_say_what_they_hold() -> None:
    def explained(schema: Any) -> int:
        if isinstance(schema, list):
            return sum(map(explained, schema))
        if not isinstance(schema, dict):
            return 0
        assert "contentEncoding" not in schema, "base64 is not what travels"
        if schema.get("x-messagepack") == "bin":
            assert schema.keys() & {"x-dtype", "x-holds"}, "a row is missing in BINARY"
            return 1
        return sum(map(explained, schema.values()))

    assert explained(DOCUMENT["components"]["schemas"]) == len(BINARY)


def test_outsiders_may_read_public_facts_and_send_only_questions_to_the_broker() -> None:
    operations = DOCUMENT["operations"]
    theirs = {name for name in operations if name.startswith("outsider.")}
    assert theirs == {
        "outsider.receive.events",
        "outsider.receive.decision",
        "outsider.send.directGetLog",
        "outsider.send.directGetBlob",
    }


# ---- what really travels


def _is_bin(_: object, kind: str, value: object, __: object) -> Any:
    if kind != "bin" or not isinstance(value, bytes):
        yield ValidationError(f"{type(value).__name__} where {kind} is due")


def _is_short(_: object, most: int, value: bytes, __: object) -> Any:
    if len(value) > most:
        yield ValidationError(f"{len(value)} bytes, {most} are allowed")


WithBytes: Any = validators.extend(
    Draft7Validator, {"x-messagepack": _is_bin, "x-max-bytes": _is_short}
)


def validator(schema: str) -> Any:
    """Checks what `#/...` in the document asks for."""
    return WithBytes({"$ref": schema, "components": DOCUMENT["components"]})


class Traffic:
    """Everything that passed a broker, held against the document."""

    def __init__(self) -> None:
        self.seen: defaultdict[str, set[str]] = defaultdict(set)
        """By channel, the messages that came over it."""
        self.arrays = set[str]()
        self.wrong: list[str] = []
        self._answers: dict[str, str] = {}
        self._channels = {
            re.compile(re.sub(r"\\{\w+\\}", "[^.]+", re.escape(channel["address"])) + "$"): name
            for name, channel in DOCUMENT["channels"].items()
            if channel["address"] is not None
        }

    def take(self, delivery: Delivery) -> None:
        """Check one message, unless it is talk between a client and JetStream."""
        name = self._answers.get(delivery.subject, "") or next(
            (name for one, name in self._channels.items() if one.match(delivery.subject)), ""
        )
        if name in ("", "directGetLogReply", "directGetBlobReply"):
            if delivery.subject.startswith(subjects.PREFIX):
                self.wrong.append(f"{delivery.subject} is no channel")
            return
        if delivery.reply and f"{name}Reply" in DOCUMENT["channels"]:
            self._answers[delivery.reply] = f"{name}Reply"
        carried = DOCUMENT["channels"][name]["messages"]
        if name == "blob":
            kind, value = "BlobChunk", delivery.data
        elif name.startswith("directGet"):
            kind, value = "DirectGet", json.loads(delivery.data)
        else:
            value = msgpack.unpackb(delivery.data)
            kind = value["type"]
        self.seen[name].add(kind)
        if kind not in carried:
            self.wrong.append(f"{name} does not carry {kind}")
            return
        self._validate(f"#/components/schemas/{kind}", value, f"{delivery.subject} {kind}")
        self._measure(kind, value)
        if name == "events":
            headers = "#/components/messageTraits/republished/headers"
            self._validate(headers, dict(delivery.headers), f"headers of {kind}")
        if kind == "SubmitUpdate":
            headers = "#/components/messages/SubmitUpdate/headers"
            self._validate(headers, dict(delivery.headers), f"headers of {kind}")

    def _measure(self, kind: str, value: Any) -> None:
        """Arrays have the length that `x-dtype` and `x-shape` promise."""
        match kind:
            case "RoundClosed" if value["commit"]:
                arrays = [("Term.coefficients", one) for one in value["commit"]["terms"]]
            case "SubmitUpdate" if value["result"]["kind"] == "probe":
                arrays = [
                    (f"ProbeResult.{name}", value["result"]) for name in ("differences", "bends")
                ]
            case "SubmitUpdate" if value["result"]["kind"] == "walk":
                arrays = [
                    (f"WalkResult.{name}", value["result"])
                    for name in ("differences", "sizes", "visits")
                ]
            case "UpdatesFolded":
                arrays = [
                    (f"PoolSums.{name}", one)
                    for one in value.get("sums", [])
                    for name in ("differences", "bends", "weights")
                ]
                arrays += [
                    (f"WalkSums.{name}", one)
                    for one in value.get("walks", [])
                    for name in ("differences", "sizes", "visits")
                ]
            case "RoundOpened" if value["walk"]:
                walk = value["walk"] | {"directions": value["directions"]}
                arrays = [("Walk.weights", walk)]
            case "WorkAssigned" if value["work"]["kind"] == "walk":
                walk = value["work"]["walk"] | {"directions": value["work"]["directions"]}
                arrays = [("Walk.weights", walk)]
            case "RoundReport" if value["importance"]:
                count = {"directions": len(value["importance"]["sizes"]) // 8}
                arrays = [
                    (f"Importance.{name}", value["importance"] | count)
                    for name in ("sizes", "visits")
                ]
            case _:
                return
        for name, holder in arrays:
            told = BINARY[name]
            numbers = np.frombuffer(holder[name.partition(".")[2]], told["x-dtype"])
            lengths = {
                "span[1]": holder["span"][1] if "span" in holder else -1,
                "sum of the counts of ranges": sum(n for _, n in holder.get("ranges", [])),
                "directions": holder.get("directions", -1),
            }
            allowed = [
                int(lengths.get(shape, shape))
                for shape in re.findall(r"\(([^,]+),\)", told["x-shape"])
            ]
            self.arrays.add(name)
            if len(numbers) not in allowed:
                self.wrong.append(f"{name} has {len(numbers)} numbers, not {told['x-shape']}")

    def _validate(self, schema: str, value: Any, what: str) -> None:
        self.wrong += [
            f"{what} {error.json_path}: {error.message}"
            for error in validator(schema).iter_errors(value)
        ]


@asynccontextmanager
async def overheard(fleet: Fleet) -> AsyncGenerator[tuple[Traffic, NatsBus]]:
    """All of the fleet's traffic from here on, and a bus of one's own."""
    traffic = Traffic()
    bus = await connect([fleet.broker.url], name="eavesdropper")

    async def listen(ready: asyncio.Event) -> None:
        async with bus.subscribe(">", limit=100_000) as deliveries:
            await bus.flush()
            ready.set()
            async for delivery in deliveries:
                traffic.take(delivery)

    try:
        async with asyncio.TaskGroup() as tasks:
            ready = asyncio.Event()
            listening = tasks.create_task(listen(ready))
            await ready.wait()
            yield traffic, bus
            listening.cancel()
    finally:
        await bus.close()


async def test_what_a_real_fleet_sends_conforms(tmp_path: Path) -> None:
    spec = JobSpec(
        task=a_task(),
        tuning=Tuning(how="probe", rounds=6, directions=32, batch_rows=100, step=0.3, eps=0.05),
        pacing=Pacing(enough_devices=2, enough_probes=32, deadline_s=5.0),
        evaluation=Evaluation(every_rounds=2),
        snapshot_every=2,
    )
    async with a_fleet(tmp_path, devices=2) as fleet, overheard(fleet) as (traffic, bus):
        await fleet.submit(fleet.job("one", spec))
        await fleet.events_until("one")
        walking = replace(
            spec,
            tuning=Tuning(
                method="fedkseed-pro",
                rounds=2,
                directions=32,
                batch_rows=4,
                local_steps=6,
                normalise="none",
                final_step=1.0,
            ),
            pacing=replace(spec.pacing, enough_probes=12),
        )
        await fleet.submit(fleet.job("two", walking))
        await fleet.events_until("two")
        for subject, question in (
            (subjects.JOB_LIST, ListJobs()),
            (subjects.JOB_STOP, StopJob(job="one")),
            (subjects.DEVICE_LIST, ListDevices()),
        ):
            await fleet.bus.request(subject, encode(question), timeout_s=10)
        await bus.flush()
        await wait_until(lambda: "ServiceReport" in traffic.seen["service"])
        assert traffic.wrong == []
        for name in ("log", "events", "detail"):
            carried = set(DOCUMENT["channels"][name]["messages"])
            assert traffic.seen[name] | {"WriterStarted"} == carried  # that one came before us
        busy = {"update", "settled", "work", "workReply", "report", "decision", "blob"}
        asked = {"jobSubmitReply", "jobListReply", "jobStopReply", "deviceListReply"}
        assert traffic.arrays == {name for name in BINARY if "x-dtype" in BINARY[name]}
        assert busy | asked | {"directGetLog"} <= traffic.seen.keys()


async def test_what_does_not_conform_is_found() -> None:
    term = {"stream_round": 1, "scope": [0, 1], "ranges": [[0, 2]], "coefficients": b"8 bytes."}
    check = validator("#/components/schemas/Term")
    assert check.is_valid(term)
    for wrong in (
        {"coefficients": "8 bytes."},
        {"coefficients": [1, 2]},
        {"scope": [0]},
        {"ranges": [[0, 0]]},
        {"stream_round": -1},
    ):
        assert not check.is_valid(term | wrong), wrong
    packed = {"result": {"kind": "probe", "differences": bytes(262_145)}}
    found = validator("#/components/schemas/ProbeResult").iter_errors(packed["result"])
    assert any("262145 bytes" in error.message for error in found)
