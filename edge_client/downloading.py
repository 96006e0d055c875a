"""A file from an HTTP server, going on where an earlier attempt broke off.

urllib in threads, one piece at a time, so that cancelling takes no longer than a piece.
"""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import EngineError, TransientError

if TYPE_CHECKING:
    from http.client import HTTPResponse

PIECE_BYTES = 256 * 1024
TIMEOUT_S = 10.0


async def download(url: str, part: Path, size_bytes: int) -> None:
    """`part` holds all `size_bytes` bytes of `url`; what it held already is not fetched again.

    Raises:
        TransientError: the link or the server failed; what came is kept.
        EngineError: the server does not have the file, or it is longer than it should be.
        OSError: the disk would not take it.
    """
    have = size_of(part)
    if have >= size_bytes:
        return
    response, start = await asyncio.to_thread(_open, url, have)
    try:
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            while data := await asyncio.to_thread(_read, response, url):
                if file.tell() + len(data) > size_bytes:
                    raise EngineError(f"{url} is longer than the {size_bytes} bytes of the model")
                file.write(data)
            came = file.tell()
    finally:
        response.close()
    if came < size_bytes:
        raise TransientError(f"{url} broke off at {came} of {size_bytes} bytes")


def size_of(path: Path) -> int:
    """How many bytes a file holds; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _open(url: str, have: int) -> "tuple[HTTPResponse, int]":
    """An open response, and the offset that its body starts at."""
    import urllib.error  # not at the top: a device that has its model needs none of it
    import urllib.request

    request = urllib.request.Request(url, headers={"User-Agent": "seedwire-edge"})  # noqa: S310
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310 - the caller lets http(s) alone pass
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in {408, 425, 429} or error.code >= 500:
            raise TransientError(f"{url}: HTTP {error.code}", delay_s=10.0) from error
        raise EngineError(f"{url}: HTTP {error.code} {error.reason}") from error
    except OSError as error:
        raise TransientError(f"{url}: {error}", delay_s=10.0) from error
    resumed = response.status == 206 and _starts_at(response.headers.get("Content-Range"), have)
    return response, have if resumed else 0


def _starts_at(content_range: str | None, offset: int) -> bool:
    return (content_range or "").startswith(f"bytes {offset}-")


def _read(response: "HTTPResponse", url: str) -> bytes:
    from http.client import HTTPException

    try:
        return response.read(PIECE_BYTES)
    except (OSError, HTTPException) as error:
        raise TransientError(f"{url}: {error}") from error
