"""The AsyncAPI 3 document of everything that travels, made from subjects and message types.

`python -m shared.asyncapi` prints it. Descriptions are the docstrings of the messages, of their
fields and of the subjects, so that nothing is said twice; only who talks to whom stands here.
"""

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from shared import bus, message_schemas, messages, subjects
from shared.blobs import CHUNK_BYTES
from shared.codec import MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES
from shared.identity.roles import EARS
from shared.message_schemas import MESSAGEPACK, Json, remarks

COMMAND = "python -m shared.asyncapi > deploy/contract/asyncapi.json"

Subject = str | Callable[..., str]

WRITER = messages.WriterStarted.__name__
LOG_EVENTS = (*(kind.__name__ for kind in get_args(messages.LogEvent)), WRITER)
DETAIL_EVENTS = (*(kind.__name__ for kind in get_args(messages.DetailEvent)), WRITER)
EARS_TOLD = f"An enrolled device hears it on `{EARS}{{}}`."
SERVICES = ("aggregator", "registrar", "scheduler", "telemetry", "proxy_inference")

PARTIES = {
    "operator": "The console: starts and stops jobs.",
    "aggregator": "Owns jobs, rounds and the adapter; the only writer of the log.",
    "registrar": "Knows the devices by their keys: lets them in, and puts them out.",
    "scheduler": "Owns the devices: says who measures what.",
    "telemetry": "Observes; nothing depends on it.",
    "proxy_inference": "Serves the model with the adapter as it was last published.",
    "device": "Runs the model on data of its own, and measures.",
    "outsider": "Any other program. It may receive what is listed here, and send nothing else.",
    "broker": "nats-server itself: it publishes again what stream LOG has accepted.",
}


@dataclass(frozen=True, slots=True)
class Channel:
    """A subject: what goes over it, from whom to whom, and what is answered."""

    subject: Subject
    carries: tuple[str, ...]
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    answers: tuple[str, ...] = ()
    stream: str = ""
    more: str = ""
    """What the subject's docstring does not say."""


CHANNELS = {
    "jobSubmit": Channel(
        subjects.JOB_SUBMIT, ("SubmitJob",), ("operator",), ("aggregator",), ("JobAccepted",)
    ),
    "jobStop": Channel(
        subjects.JOB_STOP, ("StopJob",), ("operator",), ("aggregator",), ("JobAccepted",)
    ),
    "jobEpoch": Channel(
        subjects.JOB_EPOCH, ("OpenEpoch",), ("operator",), ("aggregator",), ("JobAccepted",)
    ),
    "jobList": Channel(
        subjects.JOB_LIST, ("ListJobs",), ("operator",), ("aggregator",), ("JobsListed",)
    ),
    "deviceList": Channel(
        subjects.DEVICE_LIST, ("ListDevices",), ("operator",), ("scheduler",), ("DevicesListed",)
    ),
    "identityInvite": Channel(
        subjects.IDENTITY_INVITE,
        ("InviteDevices",),
        ("operator",),
        ("registrar",),
        ("DevicesInvited",),
    ),
    "identityRevoke": Channel(
        subjects.IDENTITY_REVOKE,
        ("RevokeDevice",),
        ("operator",),
        ("registrar",),
        ("DeviceRevoked",),
    ),
    "identityList": Channel(
        subjects.IDENTITY_LIST,
        ("ListIdentities",),
        ("operator",),
        ("registrar",),
        ("IdentitiesListed",),
    ),
    "identityRefused": Channel(
        subjects.IDENTITY_REFUSED, ("ConnectionRefused",), ("operator",), ("registrar",)
    ),
    "enroll": Channel(subjects.ENROLL, ("Enroll",), ("device",), ("registrar",), ("Enrolled",)),
    "refused": Channel(subjects.REFUSED, ("ConnectionRefused",), ("registrar",), ("telemetry",)),
    "log": Channel(
        subjects.log,
        LOG_EVENTS,
        ("aggregator",),
        (),
        stream=subjects.LOG_STREAM,
        more="Read it on `events.{job}`, and what was missed by Direct Get.",
    ),
    "events": Channel(
        subjects.events,
        LOG_EVENTS,
        ("broker",),
        ("device", "scheduler", "telemetry", "proxy_inference", "operator", "outsider"),
        more="A message whose Nats-Last-Sequence is greater than the Nats-Sequence that one had "
        f"last follows a gap: fill it by Direct Get. One with {bus.PENDING_HEADER} is not the "
        f"broker's: pass it over. {EARS_TOLD.format('events.{job}')}",
    ),
    "detail": Channel(
        subjects.detail,
        DETAIL_EVENTS,
        ("aggregator",),
        ("scheduler", "telemetry"),
        stream=subjects.DETAIL_STREAM,
    ),
    "update": Channel(
        subjects.update,
        ("SubmitUpdate",),
        ("device",),
        ("aggregator",),
        stream=subjects.UPDATES_STREAM,
    ),
    "settled": Channel(
        subjects.settled,
        ("UpdateSettled",),
        ("aggregator",),
        ("device",),
        more=EARS_TOLD.format("settled.{device}"),
    ),
    "work": Channel(
        subjects.work, ("RequestWork",), ("device",), ("scheduler",), ("WorkAssigned", "ComeBack")
    ),
    "wake": Channel(
        subjects.wake,
        ("WakeUp",),
        ("scheduler",),
        ("device",),
        more=EARS_TOLD.format("wake.{device}"),
    ),
    "report": Channel(
        subjects.report,
        ("DeviceReport",),
        ("device",),
        ("scheduler", "telemetry"),
        stream=subjects.REPORTS_STREAM,
    ),
    "decision": Channel(
        subjects.decision, ("DecisionMade",), ("scheduler",), ("telemetry", "outsider")
    ),
    "service": Channel(subjects.service, ("ServiceReport",), SERVICES, ("telemetry",)),
    "blob": Channel(
        subjects.blob,
        ("BlobChunk",),
        ("operator", "aggregator"),
        (),
        stream=subjects.BLOBS_STREAM,
        more="Read it by Direct Get.",
    ),
    "directGetLog": Channel(
        f"$JS.API.DIRECT.GET.{subjects.LOG_STREAM}",
        ("DirectGet",),
        ("device", "scheduler", "telemetry", "proxy_inference", "operator", "outsider"),
        ("broker",),
        LOG_EVENTS,
        more="What stream LOG holds, by sequence: the history of a job, and what was missed. The "
        "answers bear Nats-Sequence and Nats-Subject; an empty one with Status 204 is the last.",
    ),
    "directGetBlob": Channel(
        f"$JS.API.DIRECT.GET.{subjects.BLOBS_STREAM}",
        ("DirectGet",),
        ("device", "proxy_inference", "operator", "outsider"),
        ("broker",),
        ("BlobChunk",),
        more="Chunks of files, such as the snapshots that ModelPublished names.",
    ),
}
"""Every subject that there is; a test holds this against `shared/subjects.py`."""

UNREFUSED = ("work", "directGetLog", "directGetBlob")
"""Requests that are never answered by Refused: a device is told to come back."""

PARAMETERS: dict[str, Json] = {
    "job": {
        "description": "The job's name: 1 to 64 of A-Z a-z 0-9 _ -. Or, in a log, "
        f"`{subjects.WRITER}`, where its writer speaks of itself."
    },
    "device": {"description": "The device's name: 1 to 64 of A-Z a-z 0-9 _ -"},
    "name": {"description": "The service's name, such as aggregator."},
    "digest": {"description": "SHA-256 of the whole file, lower-case hexadecimal."},
    "index": {"description": f"The chunk's number from 0; all but the last have {CHUNK_BYTES} B."},
}


def document() -> Json:
    """The whole document; equal sources make equal documents."""
    schemas = message_schemas.schemas()
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Seedwire",
            "version": f"{subjects.PREFIX.rpartition('.v')[2]}.0.0",
            "description": (
                "What travels in a fleet that tunes a language model forward-only. Every message "
                "is a MessagePack map with its name as `type` and its schema version as `v`. New "
                "fields have defaults, a changed meaning has a new type: ignore fields and types "
                f"that you do not know. A request has at most {MAX_MESSAGE_BYTES} bytes, no "
                f"message more than {MAX_PAYLOAD_BYTES}.\n\n"
                f"{inspect.cleandoc(message_schemas.__doc__ or '').rpartition(chr(10) * 2)[2]}"
            ),
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": MESSAGEPACK,
        "servers": {
            "fleet": {
                "host": "{host}:{port}",
                "protocol": "nats",
                "description": "A NATS server, or a cluster of them, with JetStream.",
                "variables": {"host": {"default": "127.0.0.1"}, "port": {"default": "4222"}},
            }
        },
        "channels": _channels(schemas),
        "operations": _operations(),
        "components": {
            "schemas": schemas,
            "messages": {name: _message(name, schemas) for name in _carried()},
            "messageTraits": {"republished": {"headers": REPUBLISHED}},
        },
    }


REPUBLISHED: Json = {
    "type": "object",
    "required": [bus.SEQUENCE_HEADER, bus.LAST_SEQUENCE_HEADER, "Nats-Stream", "Nats-Subject"],
    "properties": {
        bus.SEQUENCE_HEADER: {
            "type": "string",
            "pattern": "^[0-9]+$",
            "description": "The message's sequence in stream LOG.",
        },
        bus.LAST_SEQUENCE_HEADER: {
            "type": "string",
            "pattern": "^[0-9]+$",
            "description": "The sequence of the same job's message before this one; 0: none.",
        },
        "Nats-Stream": {"type": "string", "const": subjects.LOG_STREAM},
        "Nats-Subject": {"type": "string", "description": "The subject in the stream."},
    },
}


def _channels(schemas: Json) -> Json:
    found: Json = {}
    for name, channel in CHANNELS.items():
        template, described, parameters = _address(channel.subject)
        made: Json = {
            "address": template,
            "description": " ".join(filter(None, [described, channel.more]))
            or _summary(schemas[channel.carries[0]]),
            "messages": {kind: _reference(name, kind) for kind in channel.carries},
            "x-outsiders": "outsider" in channel.senders + channel.receivers,
        }
        if parameters:
            made["parameters"] = {parameter: PARAMETERS[parameter] for parameter in parameters}
        if channel.stream:
            made["x-stream"] = channel.stream
        found[name] = made
        answers = _answers(name)
        if answers:
            found[f"{name}Reply"] = {
                "address": None,
                "description": f"Answers to `{template}`, on the inbox that the request names.",
                "messages": {kind: {"$ref": f"#/components/messages/{kind}"} for kind in answers},
            }
    return found


def _operations() -> Json:
    found: Json = {}
    for name, channel in CHANNELS.items():
        for action, parties in (("send", channel.senders), ("receive", channel.receivers)):
            for party in parties:
                made: Json = {
                    "action": action,
                    "channel": {"$ref": f"#/channels/{name}"},
                    "summary": f"{party}: {action} {', '.join(channel.carries)}",
                    "tags": [{"name": party, "description": PARTIES[party]}],
                    "messages": [
                        {"$ref": f"#/channels/{name}/messages/{kind}"} for kind in channel.carries
                    ],
                }
                answers = _answers(name)
                if answers:
                    made["reply"] = {
                        "address": {
                            "location": "$message.header#/reply-to",
                            "description": "The reply subject of the NATS message itself.",
                        },
                        "channel": {"$ref": f"#/channels/{name}Reply"},
                        "messages": [
                            {"$ref": f"#/channels/{name}Reply/messages/{kind}"} for kind in answers
                        ],
                    }
                found[f"{party}.{action}.{name}"] = made
    return found


def _answers(name: str) -> tuple[str, ...]:
    answers = CHANNELS[name].answers
    return (*answers, "Refused") if answers and name not in UNREFUSED else answers


def _carried() -> list[str]:
    """Every message's name, in the order of the channels."""
    found = [(*channel.carries, *_answers(name)) for name, channel in CHANNELS.items()]
    return list(dict.fromkeys(kind for kinds in found for kind in kinds))


def _address(subject: Subject) -> tuple[str, str, list[str]]:
    """A subject's template, its docstring and the names of its parameters."""
    if isinstance(subject, str):
        constants = {value: name for name, value in vars(subjects).items() if value == subject}
        return subject, remarks(subjects).get(constants.get(subject, ""), ""), []
    parameters = list(inspect.signature(subject).parameters)
    return (
        subject(*(f"{{{name}}}" for name in parameters)),
        inspect.getdoc(subject) or "",
        parameters,
    )


def _reference(channel: str, kind: str) -> Json:
    """A message as its channel carries it: what the broker publishes again bears its headers."""
    if channel != "events":
        return {"$ref": f"#/components/messages/{kind}"}
    return {
        "name": kind,
        "contentType": MESSAGEPACK,
        "traits": [{"$ref": "#/components/messageTraits/republished"}],
        "payload": {"$ref": f"#/components/schemas/{kind}"},
    }


def _message(kind: str, schemas: Json) -> Json:
    made: Json = {"name": kind, "contentType": MESSAGEPACK}
    match kind:
        case "DirectGet":
            made["contentType"] = "application/json"
        case "BlobChunk":
            made["contentType"] = "application/octet-stream"
        case "SubmitUpdate":
            described = remarks(subjects)["KEY_HEADER"]
            made["headers"] = {
                "type": "object",
                "required": [subjects.KEY_HEADER],
                "properties": {subjects.KEY_HEADER: {"type": "string", "description": described}},
            }
        case _:
            pass
    if summary := _summary(schemas[kind]):
        made["summary"] = summary
    return {**made, "payload": {"$ref": f"#/components/schemas/{kind}"}}


def _summary(schema: Json) -> str:
    """The first paragraph of a message's docstring."""
    return " ".join(schema.get("description", "").partition("\n\n")[0].split())


def text() -> str:
    """The document as it stands in the repository."""
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
