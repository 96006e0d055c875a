"""llama.cpp's low-level functions; the only importer of llama_cpp.

Handles are opaque pointers. What llama.cpp logs is silent, but for the last errors' texts.
"""

import ctypes
from collections import deque
from typing import Any

import numpy as np
from llama_cpp import _ggml
from llama_cpp import llama_cpp as typed
from numpy.typing import NDArray

from shared.errors import EngineError

native: Any = typed
"""Handles are opaque pointers, which llama_cpp's annotations call now int, now None."""

_ERROR_LEVEL = 4
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

_said: deque[str] = deque(maxlen=3)
"""The last errors that llama.cpp logged."""


def _hear(level: int, text: bytes, _: object) -> None:
    if level == _ERROR_LEVEL and text.strip():
        _said.append(text.decode(errors="replace").strip())


_ear = native.llama_log_callback(_hear)


def start() -> None:
    """llama.cpp is ready, and silent."""
    _hold_the_heap()
    native.llama_log_set(_ear, ctypes.c_void_p(0))
    native.llama_backend_init()


def wide_vectors() -> bool:
    """Whether llama.cpp computes with AVX-512 here."""
    return b"AVX512 = 1" in native.llama_print_system_info()


def load(path: str, *, vocabulary_only: bool = False) -> Any:
    """The model in `path`, mapped into memory; to be freed with `llama_model_free`.

    Raises:
        EngineError: llama.cpp cannot load it; with llama.cpp's reason.
    """
    wanted = native.llama_model_default_params()
    wanted.n_gpu_layers = 0
    wanted.load_mode = native.LLAMA_LOAD_MODE_MMAP
    wanted.vocab_only = vocabulary_only
    model = native.llama_model_load_from_file(path.encode(), wanted)
    if not model:
        raise EngineError(
            f"{path}: llama.cpp cannot load it: {reason()}; fetch the file again, or another"
        )
    return model


def _hold_the_heap() -> None:
    """Give large blocks back to the system at once.

    Each new adapter makes llama.cpp plan its graphs anew; with glibc's default, which raises its
    threshold as it goes, the heap grew by 40 MB in a thousand reloads, and not at all like this.
    Smaller blocks stay: faulting them in again took 6 % of a small model's pass.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 8 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 16 << 20)


def reason() -> str:
    """What llama.cpp logged last."""
    said = " | ".join(_said)
    _said.clear()
    return said or "it gave no reason"


def pointer(array: NDArray[Any], kind: Any) -> Any:
    """Where `array` lies, as a pointer to `kind`; the caller keeps the array."""
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


_holding: Any = ctypes.PyDLL(native._lib._name)


def _held(name: str, result: Any, *arguments: Any) -> Any:
    """One that returns at once and so keeps Python's lock: where it is let go, another thread may
    take it and hold it far longer."""
    function = getattr(_holding, name)
    function.argtypes, function.restype = arguments, result
    return function


logits_at: Any = _held("llama_get_logits", ctypes.c_void_p, ctypes.c_void_p)
"""Of a context: the address of its logits."""
remove_tokens: Any = _held(
    "llama_memory_seq_rm", ctypes.c_bool, ctypes.c_void_p, *3 * [ctypes.c_int32]
)
"""Of a context's memory, sequence, from, to: whether it could."""

tensor_name: Any = _ggml.libggml.ggml_get_name
tensor_name.argtypes, tensor_name.restype = [ctypes.c_void_p], ctypes.c_char_p
tensor_bytes: Any = _ggml.libggml.ggml_nbytes
tensor_bytes.argtypes, tensor_bytes.restype = [ctypes.c_void_p], ctypes.c_size_t
read_tensor: Any = _ggml.libggml.ggml_backend_tensor_get
read_tensor.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
read_tensor.restype = None

_row_bytes: Any = _ggml.libggml.ggml_row_size
_row_bytes.argtypes, _row_bytes.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_size_t


class _Traits(ctypes.Structure):
    """ggml.h: struct ggml_type_traits."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


_traits: Any = _ggml.libggml.ggml_get_type_traits
_traits.argtypes, _traits.restype = [ctypes.c_int], ctypes.POINTER(_Traits)
_F32 = 0


def row_bytes(kind: int, width: int) -> int:
    """Bytes of `width` weights of ggml's type `kind`."""
    return int(_row_bytes(kind, width))


def as_floats(data: memoryview, kind: int, count: int) -> NDArray[np.float32]:
    """`count` weights of ggml's type `kind` that `data` holds, (count,) float32."""
    raw = np.frombuffer(data, np.uint8)
    if kind == _F32:
        return raw.view(np.float32)[:count].copy()
    found = np.empty(count, np.float32)
    _traits(kind).contents.to_float(raw.ctypes.data, found.ctypes.data, count)
    return found
