"""Where the edge finds a model: by digest, never by name; downloads go on where they broke off."""

import functools
import hashlib
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edge_client.models import Models
from shared import blobs
from shared.errors import TransientError
from shared.log import ensure_streams
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import Variant
from shared.metrics import Counters

GGUF = bytes(range(256)) * 5000


def a_variant(url: str | None = None, data: bytes = GGUF) -> Variant:
    return Variant(hashlib.sha256(data).hexdigest(), len(data), "m.gguf", url)


class Server(BaseHTTPRequestHandler):
    """Serves GGUF with ranges, but each answer breaks off after `piece` bytes."""

    def __init__(self, data: bytes, piece: int, starts: list[int], *args: object) -> None:
        self.data, self.piece, self.starts = data, piece, starts
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        self.starts.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.data) - start))
        if start:
            last = len(self.data) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(self.data)}")
        self.end_headers()
        self.wfile.write(self.data[start : start + self.piece])

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


class Site:
    """An HTTP server of one file; `starts` are the offsets that were asked for."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self._servers: list[ThreadingHTTPServer] = []

    def serve(self, data: bytes, *, piece: int) -> str:
        handler = functools.partial(Server, data, piece, self.starts)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self._servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/m.gguf"

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def site() -> Generator[Site, None, None]:
    site = Site()
    yield site
    site.close()


@pytest.fixture
async def streams() -> MemoryBus:
    bus = MemoryBroker().connect("models")
    await ensure_streams(bus)
    return bus


async def test_an_own_file_is_known_by_its_digest(tmp_path: Path, streams: MemoryBus) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "m.gguf").write_bytes(GGUF[:-1] + b"?")
    (tmp_path / "own" / "other-name.gguf").write_bytes(GGUF)
    models = Models([str(tmp_path / "own")], tmp_path, streams, Counters())
    assert await models.find([a_variant()]) == tmp_path / "own" / "other-name.gguf"
    again = Models([str(tmp_path / "own")], tmp_path, streams, Counters())
    assert len(again.known()) == 2
    (tmp_path / "own" / "other-name.gguf").write_bytes(b"changed")
    assert a_variant().digest not in again.known()


async def test_a_download_goes_on_where_it_broke_off(
    tmp_path: Path, streams: MemoryBus, site: Site
) -> None:
    variant, counters = a_variant(site.serve(GGUF, piece=800_000)), Counters()
    models = Models([], tmp_path, streams, counters)
    with pytest.raises(TransientError, match="broke off at 800000 of 1280000"):
        await models.find([variant])
    path = await models.find([variant])
    assert path.read_bytes() == GGUF
    assert site.starts == [0, 3 * blobs.CHUNK_BYTES]
    assert await models.find([variant]) == path
    assert counters.get("model_downloads") == counters.get("model_resumes") == 1
    assert models.known() == [variant.digest]


async def test_the_broker_has_what_the_address_has_not(
    tmp_path: Path, streams: MemoryBus, site: Site
) -> None:
    """A foreign file of the right length is refused; a half download is completed by the store."""
    foreign = a_variant(site.serve(b"x" * len(GGUF), piece=1 << 30))
    models = Models([], tmp_path, streams, Counters())
    with pytest.raises(TransientError, match="is another file") as caught:
        await models.find([foreign])
    assert "put the file under `models`" in str(caught.value)
    await blobs.put(streams, GGUF)
    half = a_variant(site.serve(GGUF, piece=len(GGUF) // 2))
    assert (await models.find([half])).read_bytes() == GGUF


async def test_a_truncated_own_file_is_named(tmp_path: Path, streams: MemoryBus) -> None:
    own = tmp_path / "m.gguf"
    own.write_bytes(GGUF[:100])
    with pytest.raises(TransientError, match=f"{own} is truncated \\(100 bytes\\)"):
        await Models([str(own)], tmp_path, streams, Counters()).find([a_variant()])


async def test_a_local_path_in_the_manifest_is_used_in_place(
    tmp_path: Path, streams: MemoryBus
) -> None:
    there = tmp_path / "there.gguf"
    there.write_bytes(GGUF)
    models = Models([], tmp_path / "state", streams, Counters())
    assert await models.find([a_variant(str(there))]) == there
