"""The one port of a fleet: metrics, health, history as JSON, and the live page."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import PurePath

from aiohttp import web

from services.telemetry.history import JobHistory
from services.telemetry.live import Live
from services.telemetry.metrics import CONTENT_TYPE, exposition
from services.telemetry.service import Observer
from shared.clock import SystemClock
from shared.http import json_response

KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
GUARD = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Names and problems of devices are strangers' words: nothing in them may run or load."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A file of the page, and what says whether a browser has it already."""

    body: bytes
    kind: str
    tag: str

    @classmethod
    def of(cls, body: bytes, kind: str) -> "_Part":
        return cls(body, kind, sha256(body).hexdigest()[:32])


class Pages:
    """What each path answers; reads the observer's state, changes nothing."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.live = Live(observer, SystemClock())
        self._page = {
            "/" if part.name == "index.html" else f"/{part.name}": _Part.of(part.read_bytes(), kind)
            for part in (files("services.telemetry") / "page").iterdir()
            if (kind := KINDS.get(PurePath(part.name).suffix))
        }
        """By path."""

    def application(self) -> web.Application:
        application = web.Application(middlewares=[_json_errors])
        application.on_response_prepare.append(_guard)
        application.on_shutdown.append(self._close)
        application.add_routes([web.get(path, self.page) for path in self._page])
        application.add_routes(
            [
                web.get("/metrics", self.metrics),
                web.get("/healthz", self.healthz),
                web.get("/readyz", self.readyz),
                web.get("/jobs", self.jobs),
                web.get("/jobs/{job}", self.job),
                web.get("/devices", self.devices),
                web.get("/events", self.live.stream),
            ]
        )
        return application

    async def page(self, request: web.Request) -> web.Response:
        part = self._page[request.path]
        headers = {"Cache-Control": "no-cache", "ETag": f'"{part.tag}"'}
        if any(each.value == part.tag for each in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(
            body=part.body, content_type=part.kind, charset="utf-8", headers=headers
        )

    async def metrics(self, _: web.Request) -> web.Response:
        body = exposition(self._observer.state, self._observer.counted())
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def healthz(self, _: web.Request) -> web.Response:
        return json_response({"status": "up"})

    async def readyz(self, _: web.Request) -> web.Response:
        reason = self._observer.not_ready()
        if reason:
            return json_response({"status": "not ready", "reason": reason}, status=503)
        return json_response({"status": "ready"})

    async def jobs(self, _: web.Request) -> web.Response:
        return json_response(
            {"jobs": [job.summary() for job in self._observer.state.jobs.values()]}
        )

    async def job(self, request: web.Request) -> web.Response:
        name, jobs = request.match_info["job"], self._observer.state.jobs
        if name not in jobs:
            return json_response(
                {"error": f"no job is called {name}", "known": sorted(jobs)}, status=404
            )
        return json_response(_shown(jobs[name]))

    async def devices(self, _: web.Request) -> web.Response:
        return json_response({"devices": list(self._observer.state.devices.values())})

    async def _close(self, _: web.Application) -> None:
        self.live.close()


async def _guard(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(GUARD)


def _shown(job: JobHistory) -> dict[str, object]:
    return {
        **job.summary(),
        "rounds": list(job.rounds.values()),
        "evaluations": list(job.evaluations.values()),
        "published": list(job.published.values()),
    }


@web.middleware
async def _json_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return json_response({"error": error.reason, "path": request.path}, status=error.status)
