"""GGUF files, as far as an engine needs them: what a model's header says, and adapters to write.

Source: ggml's docs/gguf.md, version 3. Devices have no `gguf` package, and need very little of it.
"""

import mmap
import os
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.errors import EngineError

Value = int | float | bool | str | None

_MAGIC = b"GGUF"
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = dict(zip((*range(8), 10, 11, 12), ("<" + code for code in "BbHhIif?Qqd"), strict=True))
_FLOAT32 = 6
_F32 = 0
_SINGLE = {0: 4, 1: 2, 30: 2}
_SMALL = {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 20: 18}
_LARGE = {10: 84, 11: 110, 12: 144, 13: 176, 14: 210, 23: 136}
_BLOCKS = {
    kind: (weights, size)
    for weights, sizes in ((1, _SINGLE), (32, _SMALL), (256, _LARGE))
    for kind, size in sizes.items()
}
"""Of the common tensor types: weights and bytes a block."""


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the weights."""

    metadata: dict[str, Value]
    """Scalars and strings; of an array its length."""
    tensors: dict[str, tuple[int, ...]]
    """Each tensor's shape in ggml's order: (d_in, d_out) for a matrix."""

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def number(self, name: str) -> float:
        """The architecture's entry `name`, 0 where it has none."""
        value = self.metadata.get(f"{self.architecture}.{name}")
        return value if isinstance(value, int | float) else 0


def read_header(path: str) -> Header:
    """The header of a complete GGUF file.

    Raises:
        EngineError: missing, not GGUF, or cut short; names the file and the mend.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != _MAGIC:
                raise EngineError(f"{path}: not a GGUF file; convert the model to GGUF first")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}") from error
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise EngineError(f"{path}: damaged or cut short; fetch the file again") from error


class _Reader:
    def __init__(self, path: str, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 4

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
        end = 0
        for _ in range(tensor_count):
            name = self._string()
            shape = tuple(self._number("<Q") for _ in range(self._number("<I")))
            kind, offset = self._number("<I"), self._number("<Q")
            tensors[name] = shape
            weights, size = _BLOCKS.get(kind, (1, 0))
            end = max(end, offset + int(np.prod(shape, dtype=np.int64)) // weights * size)
        alignment = int(metadata.get("general.alignment") or _ALIGNMENT)
        start = -(-self._at // alignment) * alignment
        if end and start + end > len(self._data):
            raise EngineError(
                f"{self._path}: cut short: {len(self._data)} of at least {start + end} bytes; "
                "fetch the file again"
            )
        return Header(metadata, tensors)

    def _number(self, code: str) -> int:
        (value,) = struct.unpack_from(code, self._data, self._at)
        self._at += struct.calcsize(code)
        return value

    def _string(self) -> str:
        length = self._number("<Q")
        self._at += length
        if self._at > len(self._data):
            raise struct.error("string beyond the end")
        return self._data[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(_SCALARS[kind])
        kind, count = self._number("<I"), self._number("<Q")
        if kind == _STRING:
            for _ in range(count):
                length = self._number("<Q")
                self._at += length
        else:
            self._at += count * struct.calcsize(_SCALARS[kind])
        return count


Matrix = tuple[str, NDArray[np.float32]]
"""A tensor's name, and (d_out, d_in) float32."""


class LoraFile:
    """A LoRA as an unnamed GGUF file whose tensors can be rewritten in place; F32 throughout."""

    def __init__(self, architecture: str, tensors: Sequence[Matrix]) -> None:
        entries = [
            _entry("general.type", "adapter"),
            _entry("general.architecture", architecture),
            _entry("adapter.type", "lora"),
            _packed_string("adapter.lora.alpha") + struct.pack("<If", _FLOAT32, 0.0),
        ]
        infos: list[bytes] = []
        offsets: list[int] = []
        end = 0
        for name, array in tensors:
            offsets.append(end)
            rows, columns = array.shape
            infos.append(_packed_string(name) + struct.pack("<IQQIQ", 2, columns, rows, _F32, end))
            end = _aligned(end + array.nbytes)
        header = _MAGIC + struct.pack("<IQQ", 3, len(infos), len(entries))
        header += b"".join([*entries, *infos])
        start = _aligned(len(header))
        self._offsets = {
            name: start + offset for (name, _), offset in zip(tensors, offsets, strict=True)
        }
        self._named = None
        if hasattr(os, "memfd_create"):
            self._fd = os.memfd_create("adapter")
            self.path = f"/proc/self/fd/{self._fd}"
        else:
            self._named = tempfile.NamedTemporaryFile(suffix=".gguf")  # noqa: SIM115  closed below
            self._fd, self.path = self._named.fileno(), self._named.name
        os.truncate(self._fd, start + end)
        os.pwrite(self._fd, header, 0)
        for name, array in tensors:
            self.write(name, array)

    def write(self, name: str, array: NDArray[np.float32]) -> None:
        """Replace a tensor; the shape stays."""
        data = np.ascontiguousarray(array, "<f4").reshape(-1).view(np.uint8).data
        at = self._offsets[name]
        while data:
            written = os.pwrite(self._fd, data, at)
            data, at = data[written:], at + written

    def close(self) -> None:
        if self._named is not None:
            self._named.close()
        else:
            os.close(self._fd)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _packed_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _entry(name: str, value: str) -> bytes:
    return _packed_string(name) + struct.pack("<I", _STRING) + _packed_string(value)
