"""A model hub on this machine: as much of its HTTP as huggingface_hub needs to fetch one file."""

import hashlib
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_of-the-test"


@dataclass
class Hub:
    """`files` by `OWNER/REPO/PATH`, for data sets `datasets/OWNER/REPO/PATH`."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict[str, bytes])
    revisions: set[str] = field(default_factory=lambda: {"main", COMMIT})
    private: set[str] = field(default_factory=set[str])
    """Repositories that only a request with the token may see."""
    asked: list[str] = field(default_factory=list[str])
    """Method and path of each request."""

    def answer(self, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path."""
        if path.startswith("/cdn/"):
            return 200, {}, self.files[path.removeprefix("/cdn/")]
        repo, found, rest = path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        revision = unquote(revision)
        known = any(file.startswith(f"{repo}/") for file in self.files)
        if not found or not known or (repo in self.private and token != f"Bearer {TOKEN}"):
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in self.revisions:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        body = self.files.get(f"{repo}/{unquote(name)}")
        if body is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        digest = hashlib.sha256(body).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(body))}
        headers |= {"X-Linked-Etag": f'"{digest}"', "ETag": f'"{digest}"'}
        headers["Location"] = f"{self.url.replace('127.0.0.1', 'localhost')}/cdn/{repo}/{name}"
        return 302, headers, b""


@contextmanager
def a_hub() -> Generator[Hub, None, None]:
    """A hub that answers until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            status, headers, body = hub.answer(self.path, self.headers.get("Authorization", ""))
            first = 0
            if (wanted := self.headers.get("Range", "")) and status == 200 and body:
                first = int(wanted.removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
                status = 206
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[first:])

        do_HEAD = do_GET  # noqa: N815 - the base class's names

        def log_message(self, format: str, *args: object) -> None:
            """Tests are silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
