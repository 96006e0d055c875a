"""Messages to MessagePack and back; the only place that decodes what came off the wire."""

from typing import TypeVar

import msgspec

from shared.errors import MalformedMessage, RejectError
from shared.messages import AnyMessage, Manifest, Message, Refused

Kind = TypeVar("Kind")

MAX_MESSAGE_BYTES = 512 * 1024
"""Of a request; above this a blob's digest is sent instead."""
MAX_PAYLOAD_BYTES = 1024 * 1024
"""What nats-server takes unless told otherwise."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)
_manifests = msgspec.msgpack.Decoder(Manifest)


def encode(message: Message) -> bytes:
    """The MessagePack of one message."""
    return _encoder.encode(message)


def decode(data: bytes, expected: type[Kind]) -> Kind:
    """The message in `data`, which must be an `expected` (a type or a union of types).

    Raises:
        MalformedMessage: not MessagePack, not of its schema, or of another type.
    """
    try:
        message = _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise MalformedMessage(f"not a message: {error}") from error
    if not isinstance(message, expected):
        raise MalformedMessage(f"a {type(message).__name__} where it has no meaning")
    return message


def decode_answer(data: bytes, question: Message, expected: type[Kind]) -> Kind:
    """What a service answered to `question`.

    Raises:
        RejectError: it refused, or the answer cannot be read; the text is for an operator.
    """
    try:
        answer = decode(data, Message)
    except MalformedMessage as error:
        raise RejectError(f"an answer that cannot be read (another version?): {error}") from error
    if isinstance(answer, Refused):
        raise RejectError(answer.reason)
    if not isinstance(answer, expected):
        raise RejectError(f"a {type(answer).__name__} for an answer to {type(question).__name__}")
    return answer


def check_sender(subject: str, own: str) -> None:
    """The message came on the subject that its body belongs on: rights are given by subject.

    Raises:
        MalformedMessage: it did not, and so speaks for somebody else.
    """
    if subject != own:
        raise MalformedMessage(f"what belongs on {own} was sent on {subject}")


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of a manifest; they, not their meaning, enter the adapter's digest."""
    return _encoder.encode(manifest)


def decode_manifest(data: bytes) -> Manifest:
    """The manifest in `data`.

    Raises:
        MalformedMessage: not a manifest.
    """
    try:
        return _manifests.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise MalformedMessage(f"not a manifest: {error}") from error
