"""Rotary positions, as llama.cpp gives them to queries and keys."""

import numpy as np
from numpy.typing import NDArray

from shared.engine.gguf_file import Header
from shared.engine.weights import Weights
from shared.errors import EngineError

Floats = NDArray[np.float32]

_NEIGHBOURS = ("llama",)
"""Architectures that turn neighbouring entries; the others turn entry i with i + n / 2."""


class Rotary:
    """Turns the first entries of each head by angles that grow with the position.

    Source: Su et al., RoFormer (2021), eq. 34. Differs in: frequencies may be divided by a linear
    scale, or by the file's own `rope_freqs`.
    """

    def __init__(self, path: str, header: Header, weights: Weights, width: int) -> None:
        """Of heads of `width` entries.

        Raises:
            EngineError: the model scales or turns its positions in a way that is not known here.
        """
        scaling = header.text(f"{header.architecture}.rope.scaling.type")
        if scaling not in ("", "none", "linear"):
            raise EngineError(
                f"{path}: rotary scaling {scaling!r} has no closed form here; use how: probe"
            )
        turned = int(header.number("rope.dimension_count")) or width
        base = header.number("rope.freq_base") or 10000.0
        if not 0 < turned <= width or turned % 2 or base < 0:
            raise EngineError(
                f"{path}: {turned} entries of {width} turned, by powers of {base:g}: no closed "
                "form here; use how: probe"
            )
        frequencies = base ** (-np.arange(0, turned, 2, dtype=np.float64) / turned)
        if weights.has("rope_freqs.weight"):
            weights.check("rope_freqs.weight")
            divisors = weights.vector("rope_freqs.weight")
            if divisors.shape != frequencies.shape:
                raise EngineError(
                    f"{path}: rope_freqs.weight has {len(divisors)} entries, a closed form only "
                    f"with {len(frequencies)}; use how: probe"
                )
            frequencies /= divisors
        if scaling != "none":  # llama.cpp takes what names no kind for linear
            factor = header.number("rope.scaling.factor") or header.number("rope.scale_linear")
            frequencies /= factor or 1.0
        self._frequencies = frequencies
        self._turned = turned
        self._neighbours = header.architecture in _NEIGHBOURS

    def turned(self, heads: Floats, positions: NDArray[np.int64], *, back: bool = False) -> Floats:
        """`heads` (B, n, h, width) at `positions` (B, n) or (n,), turned, or turned back."""
        angles = positions[..., None, None] * self._frequencies
        turns = np.exp((-1j if back else 1j) * angles).astype(np.complex64)
        found = heads.copy()
        part = found[..., : self._turned]
        if self._neighbours:
            pairs = np.ascontiguousarray(part).view(np.complex64)
            part[:] = (pairs * turns).view(np.float32)
        else:
            half = self._turned // 2
            first, second = heads[..., :half], heads[..., half : self._turned]
            cosine, sine = turns.real, turns.imag
            part[..., :half] = first * cosine - second * sine
            part[..., half:] = first * sine + second * cosine
        return found
