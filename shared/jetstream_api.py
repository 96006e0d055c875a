"""The words of the JetStream API: what is asked, what is answered, and whose fault an error is."""

import json
from collections.abc import Mapping

import msgspec

from shared import subjects
from shared.bus import Delivery, Stored, StreamSpec
from shared.errors import ConfigError, TransientError

WRONG_LAST_SEQUENCE = (10071, 10164)
NO_STREAM = 10059
NO_MESSAGE = 10037
FULL = (10047, 10077, 10023)
WRONG_STREAM = 10060
NO_CLUSTER = 10074
NO_PEERS = 10005


MORE_ROOM = "raise max_file_store in nats-server's configuration, or remove what is not needed"
ROOM = {subjects.UPDATES_STREAM: "see that the aggregator runs, which empties it"}


class NoResponders(TransientError):
    """Nobody listens on the subject."""


class NoAnswer(TransientError):
    """Whoever listens did not answer in time."""


class ApiError(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class StreamState(msgspec.Struct):
    last_seq: int = 0
    subjects: dict[str, int] | None = None


class Found(msgspec.Struct):
    seq: int = 0


class ClusterState(msgspec.Struct):
    leader: str = ""
    replicas: list[dict[str, object]] | None = None


class Answer(msgspec.Struct):
    """What any call of the API answers; a publish is answered alike."""

    error: ApiError | None = None
    config: dict[str, object] = {}
    state: StreamState | None = None
    cluster: ClusterState | None = None
    message: Found | None = None
    stream: str = ""
    seq: int = 0
    purged: int = 0
    total: int = 0


def stream_config(spec: StreamSpec) -> dict[str, object]:
    config: dict[str, object] = {
        "name": spec.name,
        "subjects": list(spec.subjects),
        "retention": "workqueue" if spec.work_queue else "limits",
        "storage": "memory" if spec.memory else "file",
        "discard": "new" if spec.max_bytes > 0 else "old",
        "max_bytes": spec.max_bytes,
        "max_age": int(spec.max_age_s * 1e9),
        "max_msgs_per_subject": spec.max_per_subject,
        "num_replicas": spec.replicas,
        "allow_direct": True,
    }
    if spec.silent:
        config["no_ack"] = True
    if spec.republish_from:
        config["republish"] = {"src": spec.republish_from, "dest": spec.republish_to}
    return config


def ack_sequence(reply: str) -> int:
    """The stream sequence in `$JS.ACK...`: v2 has two more before it."""
    tokens = reply.split(".")
    return int(tokens[5] if len(tokens) < 11 else tokens[7])


def own_headers(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if not name.startswith("Nats-")}


def stored_from(reply: Delivery) -> Stored:
    headers = reply.headers
    return Stored(
        int(headers["Nats-Sequence"]), headers["Nats-Subject"], reply.data, own_headers(headers)
    )


def is_last_batch(stream: str, status: str, delivery: Delivery) -> bool:
    """Whether the batch that `status` ends was the last."""
    match status:
        case "204":
            return int(delivery.headers.get("Nats-Num-Pending", "0")) == 0
        case "404":
            return True
        case "503":
            raise absent(stream)
        case _:
            raise TransientError(f"a Direct Get from stream {stream} was answered {status}")


def packed(value: Mapping[str, object]) -> bytes:
    return json.dumps(value).encode()


def answer_from(reply: Delivery) -> Answer:
    try:
        return msgspec.json.decode(reply.data, type=Answer)
    except msgspec.MsgspecError as error:
        raise TransientError(f"not an answer of JetStream: {error}") from error


def absent(stream: str) -> NoResponders:
    return NoResponders(
        f"the broker has no stream {stream}, or none of its servers leads it: start the aggregator "
        "(it makes the streams), see that nats-server runs with JetStream, and most of a cluster"
    )


def unless_failed(stream: str, answer: Answer) -> Answer:
    if answer.error is not None:
        raise failed(stream, answer.error)
    return answer


def failed(stream: str, error: ApiError) -> TransientError | ConfigError:
    if error.err_code == NO_STREAM:
        return absent(stream)
    if error.err_code in FULL:
        return TransientError(
            f"stream {stream} is full ({error.description}): {ROOM.get(stream, MORE_ROOM)}",
            delay_s=5.0,
        )
    if error.err_code == WRONG_STREAM:
        return ConfigError(f"stream {stream}: {error.description}")
    return TransientError(f"stream {stream}: {error.description} (error {error.err_code})")


def unanswered(stream: str, why: TransientError) -> NoAnswer:
    """What nats-server leaves of an append that it could not write: silence, until a restart."""
    return NoAnswer(
        f"stream {stream} took nothing ({why}): if this goes on over a good link, see "
        "nats-server's log; if its disk is full, make room there and restart it"
    )


def refused(stream: str, what: str, error: ApiError) -> ConfigError | TransientError:
    if error.err_code in (NO_CLUSTER, NO_PEERS):
        return ConfigError(
            f"stream {stream} cannot be {what} with so many copies ({error.description}): give "
            "nats-server a cluster with that many servers with JetStream, all of them up, or "
            "lower stream_replicas"
        )
    if error.code >= 500 and error.err_code in FULL:
        return ConfigError(
            f"stream {stream} cannot be {what}: {error.description}: raise max_memory_store or "
            "max_file_store in nats-server's configuration"
        )
    return ConfigError(
        f"stream {stream} cannot be {what} as needed: {error.description} "
        f"(error {error.err_code}): delete it, or use a broker of its own"
    )
