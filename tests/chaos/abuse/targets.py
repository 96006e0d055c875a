"""What reads bytes that others made, as functions of bytes that may raise nothing.

Each catches the errors that its function documents; any other is a finding.
"""

import base64
import contextlib
import gzip
import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgpack  # pyright: ignore[reportMissingTypeStubs]

from services.proxy_inference import requests
from services.registrar import refusals
from shared.adapter import Adapter
from shared.codec import decode, decode_manifest, encode
from shared.dataset.records import Place, records
from shared.dataset.rows import Meaning, Refusal
from shared.engine.chat import CHATML, ChatTemplate
from shared.engine.gguf_file import lora_entries, read_header
from shared.errors import ConfigError, EngineError, MalformedMessage
from shared.identity.claims import decode_unverified
from shared.identity.ticket import PREFIX, Ticket, parse
from shared.messages import (
    DeviceReport,
    JobEnded,
    Message,
    ProbeResult,
    RequestWork,
    Speed,
    SubmitUpdate,
    Task,
    UpdateKey,
)
from tests.support.jobs import a_manifest


@dataclass(frozen=True)
class Target:
    """`seeds` are good inputs to begin with, `words` what mutations may put in."""

    run: Callable[[bytes], None]
    seeds: Sequence[bytes]
    words: Sequence[bytes] = ()


def _codec(data: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        encode(decode(data, Message))
    with contextlib.suppress(MalformedMessage):
        decode_manifest(data)


_MANIFEST = a_manifest(momentum=230, d=4)


def _snapshot(data: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        Adapter.from_bytes(_MANIFEST, data)


@cache
def _scratch() -> int:
    return os.memfd_create("fuzz")


def _gguf(data: bytes) -> None:
    os.ftruncate(_scratch(), 0)
    os.pwrite(_scratch(), data, 0)
    path = f"/proc/self/fd/{_scratch()}"
    for whole in (True, False):
        with contextlib.suppress(EngineError):
            header = read_header(path, whole=whole)
            header.number("block_count")
            header.text("tokenizer.chat_template")
            assert len(header.quantisation) < 1000


_MEANINGS = (
    Meaning(Task(loss="tokens")),
    Meaning(Task(loss="choices", labels={"a": "x", "b": "y"})),
)
_SUFFIXES = (".jsonl", ".csv", ".tsv", ".jsonl.gz", ".csv.gz")


def _dataset(data: bytes) -> None:
    """The first byte chooses the kind of file, and whether more of it may come."""
    if not data:
        return
    suffix = _SUFFIXES[data[0] % len(_SUFFIXES)]
    name, closed = f"rows{suffix}", bool(data[0] & 64)
    source: Any = io.BytesIO(data[1:])
    if suffix.endswith(".gz"):
        source = gzip.GzipFile(fileobj=source)
    place = Place()
    for record in records(name, source, place, closed=closed):
        assert record.line >= 1
        for meaning in _MEANINGS:
            with contextlib.suppress(Refusal):
                meaning.rows(record)


_SAID = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " hello <|im_end|> "},
    {"role": "assistant", "content": "<think>so</think> hi"},
)


def _template(data: bytes) -> None:
    text = data.decode(errors="replace")
    with contextlib.suppress(EngineError):
        template = ChatTemplate(text, "<s>", "</s>")
        with contextlib.suppress(EngineError):
            template.render(_SAID)
        with contextlib.suppress(EngineError):
            template.pieces(_SAID)
        template.answer("yes")


def _ticket(data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        parse(data.decode(errors="surrogateescape"))
    body = data.removeprefix(PREFIX.encode())
    with contextlib.suppress(ConfigError):  # past the checksum, which a fuzzer would not guess
        parse(_sealed(body))


def _sealed(body: bytes) -> str:
    sealed = body + zlib.crc32(body).to_bytes(4, "big")
    return PREFIX + base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()


def _token(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        decode_unverified(data.decode(errors="surrogateescape"))
    with contextlib.suppress(ValueError):
        decode_unverified(f"a.{base64.urlsafe_b64encode(data).decode()}.c")
    with contextlib.suppress(MalformedMessage):
        client, _ = refusals.read(data)
        refusals.plain(client.name)


def _request(data: bytes) -> None:
    kinds = (requests.ChatRequest, requests.CompletionRequest)
    for kind in kinds:
        with contextlib.suppress(requests.Refusal):
            request = requests.decoded(data, kind)
            requests.unserved(request)
            request.sampling(1000)
            assert all(request.stops)
            if isinstance(request, requests.ChatRequest):
                [message.plain() for message in request.messages]
            else:
                request.prompts()
    for other in (requests.ClassifyRequest, requests.RollbackRequest):
        with contextlib.suppress(requests.Refusal):
            requests.decoded(data, other)


# ---- good inputs


def _messages() -> list[bytes]:
    key = UpdateKey("job", 0, 3, "till-7", 1)
    result = ProbeResult("probe", [(0, 2)], b"\0" * 8, b"\0" * 8, 1 << 20, 4)
    report = DeviceReport(
        device="till-7",
        version="1",
        cores=4,
        memory_mb=4096,
        rows=10,
        heldout_rows=0,
        trusted=False,
        models=["a" * 64],
        speeds=[Speed("job", 0.5)],
        counters={"reconnects": 1},
        positions={"job": "3:" + "a" * 64},
    )
    return [
        encode(SubmitUpdate(key=key, digest="a" * 64, result=result, work_s=0.5)),
        encode(RequestWork(device="till-7", kinds=["probe"], last=key)),
        encode(report),
        encode(JobEnded(job="job", epoch=0, round=3, reason="finished", digest="0" * 64)),
    ]


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf_seed() -> bytes:
    entries = {**lora_entries("llama", alpha=1.0), "llama.block_count": 2}
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, len(entries) + 2)
    for name, value in entries.items():
        header += _string(name)
        if isinstance(value, str):
            header += struct.pack("<I", 8) + _string(value)
        else:
            header += struct.pack("<If", 6, float(value))
    header += _string("general.alignment") + struct.pack("<II", 4, 32)
    header += _string("tokens") + struct.pack("<IIQ", 9, 8, 2) + _string("a") + _string("b")
    header += _string("output.weight") + struct.pack("<IQQIQ", 2, 32, 2, 8, 0)
    return header + b"\0" * (-len(header) % 32 + 68)


def _rows() -> list[bytes]:
    said = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    json_lines = b"".join(
        json.dumps(row).encode() + b"\n"
        for row in ({"text": "t", "label": "a"}, {"prompt": "p", "completion": "c"}, said)
    )
    table = b'text,label\n"one, ""two""\nthree",a\nfour,b\n'
    return [
        b"@" + json_lines,
        b"\0" + json_lines,
        bytes([66 + 59]) + table,
        bytes([1]) + table,
        bytes([2]) + table.replace(b",", b"\t"),
        bytes([3]) + gzip.compress(json_lines, mtime=0),
        bytes([4]) + gzip.compress(table, mtime=0),
    ]


_JINJA = [
    *("{% for x in ", "{% endfor %}", "{% if ", "{% endif %}", "{% set x = ", "{{ ", " }}", " %}"),
    *(
        "{% macro f(n) %}",
        "{% endmacro %}",
        "f(x)",
        "range(99999)",
        "messages",
        "loop.index",
        " ~ ",
    ),
    *(" + ", " * ", " % ", " ** ", "|join", "|length", "|tojson", ".replace(", "|replace(", "'a'"),
    *(
        "|indent(",
        "99999",
        ".format(",
        ".split(",
        "namespace(",
        " recursive",
        "[::-1]",
        "bos_token",
    ),
    *("raise_exception(", "strftime_now(", "{%- ", " -%}", " is defined", "not ", " in ", "|list"),
    *(".__class__", "|map('string')", "{% generation %}", "{% endgeneration %}", "{% break %}"),
    *("{% set x %}", "{% endset %}", "{% call f(x) %}", "{% endcall %}", "{% filter trim %}"),
]
_NUMBERS = [
    struct.pack(code, value)
    for code, values in (("<I", (0, 1, 2**31, 2**32 - 1)), ("<Q", (0, 2**31, 2**63, 2**64 - 1)))
    for value in values
]
_NESTED = [b"\x91" * 500, b"\x81\xa1a" * 500, b"[" * 2000, b'{"a":' * 2000]


def _packed(value: object) -> bytes:
    data = msgpack.packb(value)
    assert data is not None
    return data


_EDGES = [
    _packed(value)
    for value in (2**64 - 1, -(2**63), 2**53 + 1, float("nan"), float("inf"), -1, "", b"", [])
]

_TICKET = Ticket(["tls://hub:4222"], "a" * 22, b"p" * 32, "seedwire", "till-7")
_CLAIMS = {"sub": "U" + "A" * 55, "name": "x", "iat": 1, "nats": {"tags": ["a"], "type": "user"}}
_EVENT = {"client": {"host": "h", "name": "n", "jwt": "a.b.c"}, "reason": "r"}
_CHAT = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    "n": 2,
    "stop": ["a"],
    "logit_bias": {"5": 1.5},
    "temperature": 0.5,
}

TARGETS = {
    "codec": Target(_codec, _messages(), [*_NESTED, *_EDGES]),
    "snapshot": Target(_snapshot, [Adapter(_MANIFEST).to_bytes()], [*_NESTED, *_EDGES]),
    "gguf": Target(_gguf, [_gguf_seed()], _NUMBERS),
    "dataset": Target(
        _dataset, _rows(), [*_NESTED, b'"', b"\r", b"\0", b"\xff", b'""', b"\xef\xbb\xbf", b","]
    ),
    "template": Target(
        _template,
        [CHATML.encode(), b"{% for m in messages if m.role %}{{ m.content|trim }}{% endfor %}"],
        [word.encode() for word in _JINJA],
    ),
    "ticket": Target(
        _ticket,
        [
            _TICKET.text().encode(),
            _packed([["a"], "a" * 22]),
            _packed([["a"], "a" * 22, b"", "", "x"]),
        ],
        _NESTED,
    ),
    "token": Target(
        _token, [json.dumps(_CLAIMS).encode(), json.dumps(_EVENT).encode(), b"a.e30.c"], _NESTED
    ),
    "request": Target(
        _request,
        [json.dumps(_CHAT).encode(), b'{"prompt": [[1, 2], [3]], "max_tokens": 3, "echo": true}'],
        [*_NESTED, b"1e999", b"\\ud800", b"null", b"-9223372036854775809", b"NaN"],
    ),
}
"""By name; the sources whose lines count as coverage are all of the project's."""
