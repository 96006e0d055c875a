"""The one port of a fleet: metrics, health, and history as JSON."""

from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from services.telemetry.history import JobHistory
from services.telemetry.metrics import CONTENT_TYPE, exposition
from services.telemetry.service import Observer


class Pages:
    """What each path answers; reads the observer's state, changes nothing."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def application(self) -> web.Application:
        application = web.Application(middlewares=[_json_errors])
        application.add_routes(
            [
                web.get("/metrics", self.metrics),
                web.get("/healthz", self.healthz),
                web.get("/readyz", self.readyz),
                web.get("/jobs", self.jobs),
                web.get("/jobs/{job}", self.job),
                web.get("/devices", self.devices),
            ]
        )
        return application

    async def metrics(self, _: web.Request) -> web.Response:
        body = exposition(self._observer.state, self._observer.counted())
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def healthz(self, _: web.Request) -> web.Response:
        return _json({"status": "up"})

    async def readyz(self, _: web.Request) -> web.Response:
        reason = self._observer.not_ready()
        if reason:
            return _json({"status": "not ready", "reason": reason}, status=503)
        return _json({"status": "ready"})

    async def jobs(self, _: web.Request) -> web.Response:
        return _json({"jobs": [job.summary() for job in self._observer.state.jobs.values()]})

    async def job(self, request: web.Request) -> web.Response:
        name, jobs = request.match_info["job"], self._observer.state.jobs
        if name not in jobs:
            return _json({"error": f"no job is called {name}", "known": sorted(jobs)}, status=404)
        return _json(_shown(jobs[name]))

    async def devices(self, _: web.Request) -> web.Response:
        return _json({"devices": list(self._observer.state.devices.values())})


def _shown(job: JobHistory) -> dict[str, object]:
    return {
        **job.summary(),
        "method": job.method,
        "how": job.how,
        "closed": job.closed,
        "rounds": list(job.rounds.values()),
        "evaluations": list(job.evaluations.values()),
        "published": list(job.published.values()),
    }


def _json(value: object, *, status: int = 200) -> web.Response:
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, content_type="application/json")


@web.middleware
async def _json_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _json({"error": error.reason, "path": request.path}, status=error.status)
