"""GGUF files, as far as Seedwire needs them: what a model's header says, and adapters to write.

Source: ggml's docs/gguf.md, version 3. Devices have no `gguf` package, and need very little of it.
"""

import math
import mmap
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import EngineError

Value = int | float | bool | str | None

_MAGIC = b"GGUF"
_ALIGNMENT = 32
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_SCALARS = dict(zip((*range(8), 10, 11, 12), ("<" + code for code in "BbHhIif?Qqd"), strict=True))
_FLOAT32 = 6
_WRITTEN = {np.dtype(np.float32): 0, np.dtype(np.float16): 1}
_SINGLE = {0: 4, 1: 2, 30: 2}
_SMALL = {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 20: 18}
_LARGE = {10: 84, 11: 110, 12: 144, 13: 176, 14: 210, 23: 136}
BLOCKS = {
    kind: (weights, size)
    for weights, sizes in ((1, _SINGLE), (32, _SMALL), (256, _LARGE))
    for kind, size in sizes.items()
}
"""Of the common tensor types: weights and bytes a block."""
_PLAIN = {0: "F32", 1: "F16", 30: "BF16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"}
_MIXED = {10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS"}
_NAMES = _PLAIN | _MIXED
_MOST_DIMENSIONS = 4
_LARGEST_ALIGNMENT = 1 << 20
_MOST_ITEMS = 1 << 24
"""Of all arrays of strings together: the largest vocabularies have 2^18."""


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the weights."""

    metadata: dict[str, Value]
    """Scalars and strings; of an array its length."""
    tensors: dict[str, tuple[int, ...]]
    """Each tensor's shape in ggml's order: (d_in, d_out) for a matrix."""
    types: dict[str, str] = field(default_factory=dict[str, str])
    """Each tensor's type, such as Q8_0."""
    places: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """Each tensor's type as ggml numbers it, and where its bytes begin in the file."""

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def number(self, name: str) -> float:
        """The architecture's entry `name`, 0 where it has none that is finite."""
        value = self.metadata.get(f"{self.architecture}.{name}")
        return value if isinstance(value, int | float) and math.isfinite(value) else 0

    def text(self, name: str) -> str:
        """The metadata's entry `name` if it is a text; empty otherwise."""
        value = self.metadata.get(name)
        return value if isinstance(value, str) else ""

    @property
    def quantisation(self) -> str:
        """The types of its weights with their shares, the largest first; none under 1%."""
        weights: Counter[str] = Counter()
        for name, kind in self.types.items():
            weights[kind] += math.prod(self.tensors[name])
        if not weights.total():
            return ""
        large = [(kind, count / weights.total()) for kind, count in weights.most_common()]
        large = [(kind, share) for kind, share in large if share >= 0.01]
        if len(large) == 1:
            return large[0][0]
        return ", ".join(f"{kind} ({share:.0%})" for kind, share in large)


def read_header(path: str, *, whole: bool = True) -> Header:
    """The header of a GGUF file, which must be complete unless not `whole`.

    Raises:
        EngineError: missing, not GGUF, or cut short; names the file and the mend.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != _MAGIC:
                raise EngineError(f"{path}: not a GGUF file; convert the model to GGUF first")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, whole=whole).header()
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}") from error
    except (_Damaged, struct.error, UnicodeDecodeError) as error:
        raise EngineError(f"{path}: damaged or cut short; fetch the file again") from error


class _Damaged(Exception):
    """What no GGUF file says."""


class _Reader:
    """Nothing that a file says of itself makes it take more memory, or time, than its size."""

    def __init__(self, path: str, data: mmap.mmap, *, whole: bool) -> None:
        self._path = path
        self._data = data
        self._whole = whole
        self._at = 4
        self._items = 0

    def header(self) -> Header:
        version = self._number("<I")
        if version not in (2, 3):
            raise EngineError(f"{self._path}: GGUF version {version} is not supported; use 3")
        tensor_count, entry_count = self._number("<Q"), self._number("<Q")
        metadata: dict[str, Value] = {}
        for _ in range(entry_count):
            name = self._string()
            metadata[name] = self._value(self._number("<I"))
        tensors: dict[str, tuple[int, ...]] = {}
        types: dict[str, str] = {}
        offsets: dict[str, tuple[int, int]] = {}
        end = 0
        for _ in range(tensor_count):
            name = self._string()
            dimensions = self._number("<I")
            if dimensions > _MOST_DIMENSIONS:
                raise _Damaged(f"a tensor of {dimensions} dimensions")
            shape = tuple(self._number("<Q") for _ in range(dimensions))
            kind, offset = self._number("<I"), self._number("<Q")
            tensors[name], types[name] = shape, _NAMES.get(kind, f"type {kind}")
            offsets[name] = (kind, offset)
            weights, size = BLOCKS.get(kind, (1, 0))
            end = max(end, offset + math.prod(shape) // weights * size)
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= _LARGEST_ALIGNMENT:
            raise _Damaged(f"tensors aligned to {alignment}")
        start = -(-self._at // alignment) * alignment
        if self._whole and end and start + end > len(self._data):
            raise EngineError(
                f"{self._path}: cut short: {len(self._data)} of at least {start + end} bytes; "
                "fetch the file again"
            )
        places = {name: (kind, start + offset) for name, (kind, offset) in offsets.items()}
        return Header(metadata, tensors, types, places)

    def _number(self, code: str) -> int:
        (value,) = struct.unpack_from(code, self._data, self._at)
        self._at += struct.calcsize(code)
        return value

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._data):
            raise _Damaged("an entry beyond the end")

    def _string(self) -> str:
        length = self._number("<Q")
        self._skip(length)
        return self._data[self._at - length : self._at].decode()

    def _scalar(self, kind: int) -> str:
        code = _SCALARS.get(kind)
        if code is None:
            raise _Damaged(f"an entry of kind {kind}")
        return code

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(self._scalar(kind))
        kind, count = self._number("<I"), self._number("<Q")
        if kind != _STRING:
            self._skip(count * struct.calcsize(self._scalar(kind)))
            return count
        self._items += count
        if self._items > _MOST_ITEMS:
            raise _Damaged(f"arrays of {self._items} strings")
        for _ in range(count):
            self._skip(self._number("<Q"))
        return count


Entry = str | bool | int | float
"""What stands in a file that we write; an int is an unsigned one of 32 bits, a float of 32 too."""

Tensor = tuple[str, NDArray[Any]]
"""A tensor's name, and its float32 or float16 numbers: (d_out, d_in) for a matrix."""


def write_file(path: Path, entries: Mapping[str, Entry], tensors: Sequence[Tensor]) -> None:
    """A whole GGUF file is at `path`, in place of any that was."""
    header, offsets, size = _laid_out(entries, tensors)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(header)
        for name, array in tensors:
            file.seek(offsets[name])
            file.write(_bytes(array))
        file.truncate(size)
    part.replace(path)


class LoraFile:
    """A LoRA as an unnamed GGUF file whose tensors can be rewritten in place; F32 throughout."""

    def __init__(self, architecture: str, tensors: Sequence[Tensor]) -> None:
        entries = lora_entries(architecture, alpha=0.0)
        header, self._offsets, size = _laid_out(entries, tensors)
        self._named = None
        if hasattr(os, "memfd_create"):
            self._fd = os.memfd_create("adapter")
            self.path = f"/proc/self/fd/{self._fd}"
        else:
            self._named = tempfile.NamedTemporaryFile(suffix=".gguf")  # noqa: SIM115  closed below
            self._fd, self.path = self._named.fileno(), self._named.name
        os.truncate(self._fd, size)
        os.pwrite(self._fd, header, 0)
        for name, array in tensors:
            self.write(name, array)

    def write(self, name: str, array: NDArray[np.float32]) -> None:
        """Replace a tensor; the shape stays."""
        data = _bytes(array)
        at = self._offsets[name]
        while data:
            written = os.pwrite(self._fd, data, at)
            data, at = data[written:], at + written

    def close(self) -> None:
        if self._named is not None:
            self._named.close()
        else:
            os.close(self._fd)


def lora_entries(architecture: str, *, alpha: float) -> dict[str, Entry]:
    """What makes a file a LoRA to llama.cpp.

    It multiplies B A by alpha / rank, and by 1 where alpha is 0.
    """
    return {
        "general.type": "adapter",
        "general.architecture": architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }


def _laid_out(
    entries: Mapping[str, Entry], tensors: Sequence[Tensor]
) -> tuple[bytes, dict[str, int], int]:
    """The file's header, where each tensor begins in it, and its size."""
    infos: list[bytes] = []
    offsets: dict[str, int] = {}
    end = 0
    for name, array in tensors:
        offsets[name] = end
        shape = array.shape[::-1]
        kind = _WRITTEN[array.dtype]
        numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, end)
        infos.append(_packed_string(name) + numbers)
        end = _aligned(end + array.nbytes)
    header = _MAGIC + struct.pack("<IQQ", 3, len(infos), len(entries))
    header += b"".join([_entry(name, value) for name, value in entries.items()] + infos)
    start = _aligned(len(header))
    return header, {name: start + offset for name, offset in offsets.items()}, start + end


def _bytes(array: NDArray[Any]) -> memoryview:
    little = array.dtype.newbyteorder("<")
    return np.ascontiguousarray(array, little).reshape(-1).view(np.uint8).data


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _packed_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _entry(name: str, value: Entry) -> bytes:
    match value:
        case str():
            packed = struct.pack("<I", _STRING) + _packed_string(value)
        case bool():
            packed = struct.pack("<I?", _BOOL, value)
        case int():
            packed = struct.pack("<II", _UINT32, value)
        case float():
            packed = struct.pack("<If", _FLOAT32, value)
    return _packed_string(name) + packed
