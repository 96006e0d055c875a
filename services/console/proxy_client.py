"""Questions to a proxy over HTTP, for one command; blocking, so that Ctrl-C ends just an answer."""

import http.client
import json
import os
from collections.abc import Generator
from contextlib import closing
from typing import Annotated, Any, cast
from urllib.parse import quote, urlsplit

import typer

from services.console.failure import EXIT_UNREACHABLE, Failure, Usage

URL = "http://127.0.0.1:8080"
PATIENCE_S = 300.0

Url = Annotated[
    str,
    typer.Option(
        envvar="SEEDWIRE_URL",
        help="The server's address; a key that it wants is read from SEEDWIRE_API_KEY.",
    ),
]


class ProxyClient:
    """One server."""

    def __init__(self, url: str) -> None:
        """Raises Usage for an address that is none."""
        parts = urlsplit(url if "//" in url else f"//{url}", scheme="http")
        try:
            port = parts.port
        except ValueError as error:
            raise Usage(f"--url {url}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Usage(f"--url {url}: give http://HOST:PORT")
        self._url = url
        self._secure = parts.scheme == "https"
        self._host = parts.hostname
        self._port = port
        self._path = parts.path.rstrip("/").removesuffix("/v1")

    def get(self, path: str) -> dict[str, Any]:
        """Raises Failure where the server does not answer, or refuses."""
        return self._whole("GET", path, None)

    def post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        """Raises Failure where the server does not answer, or refuses."""
        return self._whole("POST", path, body)

    def stream(self, path: str, body: dict[str, object]) -> Generator[dict[str, Any], None, None]:
        """The events of an answer as they come; closing it ends the answer.

        Raises:
            Failure: the server does not answer, refuses, or fails on the way.
        """
        with closing(self._connection()) as connection:
            response = self._asked(connection, "POST", path, body | {"stream": True})
            while line := self._line(response):
                data = line.strip().removeprefix(b"data: ")
                if data == b"[DONE]":
                    return
                if data:
                    event = cast("dict[str, Any]", json.loads(data))
                    if "error" in event:
                        raise Failure(str(event["error"]["message"]))
                    yield event
            raise Failure(f"{self._url} broke off in the middle of its answer")

    def labels(self, model: str | None) -> tuple[str, list[str]]:
        """The model that will answer, and its labels, if its job has any."""
        if model is None:
            model = str(self.get("/health")["model"])
        shown = self.get(f"/v1/models/{quote(model, safe='@')}")
        return model, list(shown.get("labels") or [])

    def _whole(self, method: str, path: str, body: dict[str, object] | None) -> dict[str, Any]:
        with closing(self._connection()) as connection:
            response = self._asked(connection, method, path, body)
            try:
                return cast("dict[str, Any]", json.loads(response.read()))
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise Failure(f"{self._url}{path} gave no answer: {error}") from error

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=PATIENCE_S)

    def _asked(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: dict[str, object] | None,
    ) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json", "User-Agent": "seedwire"}
        if key := os.environ.get("SEEDWIRE_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self._path + path, data, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise Failure(
                f"no server answers at {self._url} ({error}); start one with `seedwire up` "
                "(or `python -m services.proxy_inference`), or name yours with --url or "
                "SEEDWIRE_URL",
                code=EXIT_UNREACHABLE,
            ) from error
        if response.status >= 400:
            raise Failure(f"{self._url}: {_why(response)}")
        return response

    def _line(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.readline()
        except (OSError, http.client.HTTPException) as error:
            raise Failure(f"{self._url} broke off: {error}") from error


def _why(response: http.client.HTTPResponse) -> str:
    """What an error says; a key that is missing is told with its mend."""
    if response.status == 401:
        return "it wants a key: set SEEDWIRE_API_KEY"
    try:
        told = json.loads(response.read())
        error = told.get("error")
        return str(error["message"] if isinstance(error, dict) else told["reason"])
    except (OSError, http.client.HTTPException, ValueError, LookupError, AttributeError):
        return f"HTTP {response.status} {response.reason}"
