"""A model's weights as float32, read from its GGUF file when they are wanted."""

import mmap

import numpy as np
from numpy.typing import NDArray

from shared.engine.gguf_file import BLOCKS, Header
from shared.engine.native import as_floats, row_bytes
from shared.errors import EngineError


class Weights:
    """The tensors of one file, mapped into memory as llama.cpp maps them."""

    def __init__(self, path: str, header: Header) -> None:
        """Of the file at `path`, whose header is `header`.

        Raises:
            EngineError: it cannot be read.
        """
        self._path = path
        self._header = header
        try:
            with open(path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise EngineError(f"{path}: cannot be read: {error.strerror}") from error

    def has(self, name: str) -> bool:
        return name in self._header.tensors

    def check(self, name: str) -> None:
        """Find what ggml would end the process over.

        Raises:
            EngineError: the tensor is missing, or of a type that is not read here.
        """
        shape = self._shape(name)
        width = shape[0] if shape else 0
        entries, _ = BLOCKS.get(self._header.places[name][0], (0, 0))
        if not entries or not width or width % entries:
            kind = self._header.types[name]
            raise EngineError(f"{self._path}: {name} is of {kind}, not read here; use how: probe")

    def height(self, name: str) -> int:
        """How many rows a matrix has."""
        return self._shape(name)[1]

    def vector(self, name: str) -> NDArray[np.float32]:
        """(d,)"""
        return self._rows(name, 0, 1, self._shape(name)[0])[0]

    def matrix(self, name: str) -> NDArray[np.float32]:
        """(d_out, d_in)"""
        width, height = self._shape(name)
        return self._rows(name, 0, height, width)

    def rows(self, name: str, low: int, high: int) -> NDArray[np.float32]:
        """Rows [low, high) of a matrix: (high - low, d_in)."""
        return self._rows(name, low, high - low, self._shape(name)[0])

    def chosen(self, name: str, rows: NDArray[np.integer]) -> NDArray[np.float32]:
        """Rows `rows` (n,) of a matrix: (n, d_in)."""
        width, height = self._shape(name)
        kind, start = self._header.places[name]
        size = row_bytes(kind, width)
        packed = np.frombuffer(self._data, np.uint8, height * size, start).reshape(height, size)
        return as_floats(packed[rows].reshape(-1).data, kind, len(rows) * width).reshape(-1, width)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._header.tensors:
            raise EngineError(f"{self._path}: no tensor {name}")
        return self._header.tensors[name]

    def _rows(self, name: str, low: int, count: int, width: int) -> NDArray[np.float32]:
        kind, start = self._header.places[name]
        size = row_bytes(kind, width)
        part = memoryview(self._data)[start + low * size : start + (low + count) * size]
        return as_floats(part, kind, count * width).reshape(count, width)
