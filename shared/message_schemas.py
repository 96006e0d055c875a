"""JSON Schemas of the messages, in AsyncAPI's dialect of draft 7.

JSON Schema knows no bytes. A field of MessagePack type bin has the keyword `x-messagepack: bin`
instead of a type, `x-max-bytes` where it is bounded, and `x-dtype` (as numpy writes it), `x-shape`
and `x-unit` where it is an array of numbers. Whoever validates adds `x-messagepack` as a keyword.
"""

import ast
import inspect
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import msgspec
from msgspec.inspect import BytesType, StructType
from msgspec.inspect import type_info as inspect_type

from shared import messages
from shared.blobs import CHUNK_BYTES

MESSAGEPACK = "application/vnd.msgpack"

Json = dict[str, Any]

COUNTED = "(sum of the counts of ranges,)"
OR_NONE = f"{COUNTED} or (0,)"
COEFFICIENTS = {"x-dtype": "<i4", "x-shape": COUNTED}
BINARY: dict[str, Json] = {
    "Term.coefficients": {**COEFFICIENTS, "x-unit": "2^-24"},
    "ProbeResult.differences": {**COEFFICIENTS, "x-unit": "2^-20 nat"},
    "ProbeResult.bends": {"x-dtype": "<i4", "x-shape": OR_NONE, "x-unit": "2^-20 nat"},
    "PoolSums.differences": {"x-dtype": "<i8", "x-shape": "(span[1],)", "x-unit": "2^-20 nat"},
    "PoolSums.bends": {"x-dtype": "<i8", "x-shape": "(span[1],) or (0,)", "x-unit": "2^-20 nat"},
    "PoolSums.weights": {"x-dtype": "<i8", "x-shape": "(span[1],) or (1,)"},
    "WalkSums.differences": {"x-dtype": "<i8", "x-shape": COUNTED, "x-unit": "2^-20 nat"},
    "WalkSums.sizes": {"x-dtype": "<i8", "x-shape": OR_NONE, "x-unit": "2^-20 nat"},
    "WalkSums.visits": {"x-dtype": "<i8", "x-shape": OR_NONE},
    "WalkResult.differences": {**COEFFICIENTS, "x-unit": "2^-20 nat"},
    "WalkResult.sizes": {"x-dtype": "<i8", "x-shape": OR_NONE, "x-unit": "2^-20 nat"},
    "WalkResult.visits": {"x-dtype": "<u2", "x-shape": OR_NONE},
    "Walk.weights": {"x-dtype": "<u2", "x-shape": "(directions,) or (0,)"},
    "Importance.sizes": {"x-dtype": "<i8", "x-shape": "(directions,)", "x-unit": "2^-20 nat"},
    "Importance.visits": {"x-dtype": "<i8", "x-shape": "(directions,)"},
    "SubmitJob.manifest": {"x-holds": "Manifest", "contentMediaType": MESSAGEPACK},
    "OpenEpoch.manifest": {"x-holds": "Manifest", "contentMediaType": MESSAGEPACK},
    "EpochOpened.manifest": {"x-holds": "Manifest", "contentMediaType": MESSAGEPACK},
}
"""What is in the bytes of each field of MessagePack type bin."""


def schemas() -> Json:
    """A schema for every message and every part of one, by name; docstrings describe them."""
    _, components = msgspec.json.schema_components(
        [messages.AnyMessage, messages.Manifest], ref_template="#/components/schemas/{name}"
    )
    told: dict[str, str] = {}
    for name in sorted({getattr(messages, name).__module__ for name in components}):
        told |= remarks(sys.modules[name])
    found: Json = {}
    for name in sorted(components):
        schema = _draft7(components[name])
        if "description" in schema:
            schema["description"] = inspect.cleandoc(schema["description"])
        for field, value in schema.get("properties", {}).items():
            if f"{name}.{field}" in BINARY:
                value |= BINARY[f"{name}.{field}"] | _bound(name, field)
            if f"{name}.{field}" in told:
                # Beside a $ref everything is ignored in draft 7, so that the reference moves down.
                below = {"allOf": [value]} if "$ref" in value else value
                schema["properties"][field] = {"description": told[f"{name}.{field}"], **below}
        found[name] = schema
    return {**found, **OTHERS}


OTHERS: Json = {
    "BlobChunk": {
        "description": "The bytes of one chunk, as they stand in the file.",
        "x-max-bytes": CHUNK_BYTES,
    },
    "DirectGet": {
        "description": "NATS ADR-31: one stored message, or, with `batch`, a run of them.",
        "type": "object",
        "properties": {
            "seq": {"type": "integer", "minimum": 1, "description": "From this sequence on."},
            "next_by_subj": {"type": "string", "description": "Of this subject; wildcards do."},
            "last_by_subj": {"type": "string", "description": "The newest of this subject."},
            "batch": {"type": "integer", "minimum": 1, "description": "How many at most."},
            "max_bytes": {"type": "integer", "minimum": 1},
        },
    },
}
"""What is no message of ours."""


def _bound(name: str, field: str) -> Json:
    """How many bytes a field may have; the JSON Schema that msgspec makes counts base64."""
    kind = inspect_type(getattr(messages, name))
    assert isinstance(kind, StructType)
    found = next(one.type for one in kind.fields if one.encode_name == field)
    assert isinstance(found, BytesType)
    return {} if found.max_length is None else {"x-max-bytes": found.max_length}


def _draft7(schema: Any) -> Any:
    """JSON Schema 2020-12 as msgspec writes it, in AsyncAPI's dialect of draft 7."""
    if isinstance(schema, list):
        return [_draft7(part) for part in schema]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(schema, dict):
        return schema
    found: Json = {key: _draft7(value) for key, value in schema.items() if key != "discriminator"}
    if found.get("contentEncoding") == "base64":
        return {"x-messagepack": "bin"}
    if "prefixItems" in found:
        found["items"], found["additionalItems"] = found.pop("prefixItems"), False
    return found


def remarks(module: ModuleType) -> dict[str, str]:
    """The string literals under a module's names and, as `Class.field`, its classes' fields."""
    tree = ast.parse(inspect.getsource(module))
    found = _literals(tree.body, "")
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= _literals(node.body, f"{node.name}.")
    return found


def _literals(body: list[ast.stmt], prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for node, following in pairwise(body):
        match node, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[prefix + name] = " ".join(inspect.cleandoc(text).split())
            case _:
                pass
    return found
