"""The port: routes, the bearer token, errors in OpenAI's shape, an operator's orders."""

import hmac
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web

from services.proxy_inference import answers
from services.proxy_inference.answers import Json
from services.proxy_inference.completing import Completing
from services.proxy_inference.metrics import CONTENT_TYPE
from services.proxy_inference.requests import Refusal, RollbackRequest, decoded
from services.proxy_inference.service import Proxy
from services.proxy_inference.versions import BASE, Version
from shared.http import json_response
from shared.logs import get

SWAP_WAIT_S = 30.0
"""An order answers when its version serves, or after this."""

_OPEN = frozenset({"/health", "/healthz"})
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}

log = get("http")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """What each path answers."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._key = proxy.settings.api_key.encode()
        self._started = int(time.time())

    def application(self) -> web.Application:
        application = web.Application(
            middlewares=[self._guarded], client_max_size=self._proxy.settings.body_bytes
        )
        completing = Completing(self._proxy)
        application.add_routes(
            [
                web.get("/health", self.health),
                web.get("/healthz", self.alive),
                web.get("/metrics", self.metrics),
                web.get("/v1/models", self.models),
                web.get("/v1/models/{model}", self.model),
                web.post("/v1/completions", completing.completions),
                web.post("/v1/chat/completions", completing.chat),
                web.post("/v1/classify", completing.classify),
                web.get("/v1/seedwire/versions", self.versions),
                web.get("/v1/seedwire/routes", self.routes),
                web.post("/v1/seedwire/rollback", self.rollback),
                web.post("/v1/seedwire/follow", self.follow),
            ]
        )
        return application

    async def health(self, _: web.Request) -> web.Response:
        reason = self._proxy.unwell
        if reason:
            return json_response({"status": "unavailable", "reason": reason}, status=503)
        default = self._proxy.pool.default
        assert default is not None
        shown: Json = {"status": "ok", "model": default.name, "fingerprint": default.fingerprint}
        if self._proxy.swapper.problem:
            shown["problem"] = self._proxy.swapper.problem
        return json_response(shown)

    async def alive(self, _: web.Request) -> web.Response:
        """The event loop turns; what it can serve is `health`'s to say."""
        return json_response({"status": "up"})

    async def metrics(self, _: web.Request) -> web.Response:
        body = self._proxy.metrics.exposition()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def models(self, _: web.Request) -> web.Response:
        data = [self._model(name) for name in self._names()]
        return json_response({"object": "list", "data": data})

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        if name not in self._names():
            raise Refusal(
                404,
                f"no model {name[:100]!r}; there are {', '.join(self._names()) or 'none'}",
                param="model",
                code="model_not_found",
            )
        return json_response(self._model(name))

    async def versions(self, _: web.Request) -> web.Response:
        return json_response(self._versions())

    async def routes(self, _: web.Request) -> web.Response:
        return json_response(self._routes())

    async def rollback(self, request: web.Request) -> web.Response:
        body = await request.read()
        asked = decoded(body, RollbackRequest) if body.strip() else RollbackRequest()
        await self._proxy.rollback(asked.round)
        return await self._ordered()

    async def follow(self, _: web.Request) -> web.Response:
        await self._proxy.follow()
        return await self._ordered()

    async def _ordered(self) -> web.Response:
        """202 if what was ordered does not serve yet."""
        settled = await self._proxy.settled(SWAP_WAIT_S)
        return json_response(self._versions(), status=200 if settled else 202)

    def _names(self) -> list[str]:
        if self._proxy.pool.default is None:
            return []
        listed = self._proxy.versions.listed()
        jobs = list(dict.fromkeys(version.job for version in listed))
        return [*jobs, *(version.name for version in listed), BASE]

    def _model(self, name: str) -> Json:
        """As OpenAI's, and, of a job with labels, what they are."""
        shown: Json = {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "seedwire",
        }
        spec = self._proxy.versions.spec(name.partition("@")[0])
        if spec is not None and spec.task.labels:
            shown["labels"] = list(spec.task.labels)
        return shown

    def _versions(self) -> Json:
        proxy = self._proxy
        default, pin = proxy.pool.default, proxy.versions.pin
        loaded = {held.name for held in proxy.pool.alive}
        return {
            "serving": default.name if default else None,
            "system_fingerprint": default.fingerprint if default else None,
            "pinned": f"{pin.job}@{pin.round}" if pin else None,
            "problem": proxy.swapper.problem or None,
            "versions": [
                {
                    "model": version.name,
                    "job": version.job,
                    "round": version.round,
                    "digest": version.digest,
                    "loaded": version.name in loaded,
                    "kept": proxy.versions.kept(version),
                    "routes": self._table(version),
                }
                for version in proxy.versions.listed()
            ],
            "refused": dict(proxy.versions.refused),
        }

    def _routes(self) -> Json:
        """What every mode came to, of what serves and of what served before."""
        proxy = self._proxy
        default, routes = proxy.pool.default, proxy.routes
        way = proxy.way(default, None, None) if default else None
        return {
            "serving": default.name if default else None,
            "mode": way.mode if way else None,
            "alpha": way.alpha if way and way.mode == "ensemble" else None,
            "set_by_operator": bool(proxy.settings.mode),
            "measuring": routes.measuring or None,
            "problem": routes.problem or None,
            "versions": {
                version.name: told
                for version in proxy.versions.listed()
                if (told := self._table(version)) is not None
            },
        }

    def _table(self, version: Version) -> Json | None:
        table = self._proxy.routes.of(version.fingerprint)
        return table.told() if table else None

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every request is checked, counted, and answered in JSON whatever happens."""
        if request.path in _OPEN:
            return await handler(request)
        metrics = self._proxy.metrics
        status = 499  # the client went away
        metrics.in_flight += 1
        try:
            response = await self._answered(request, handler)
            status = response.status
            return response
        finally:
            metrics.in_flight -= 1
            resource = request.match_info.route.resource
            path = resource.canonical if resource else "other"
            metrics.requests.labels(path, str(status)).inc()

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._check(request)
            return await handler(request)
        except Refusal as refusal:
            return _refused(refusal)
        except web.HTTPRequestEntityTooLarge:
            most = self._proxy.settings.body_bytes
            return _refused(Refusal(413, f"the body is larger than {most} bytes"))
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return _refused(Refusal(error.status, f"{request.path}: {error.reason}"))

    def _check(self, request: web.Request) -> None:
        """Raises Refusal for a stranger, for another site's page, and while the server stops."""
        if self._key:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self._key)
            if scheme.lower() != "bearer" or not right:
                raise Refusal(
                    401,
                    "a wrong or no API key: send Authorization: Bearer KEY",
                    code="invalid_api_key",
                )
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            raise Refusal(403, "pages of other sites may not ask this server")
        if self._proxy.draining:
            raise Refusal(503, "the server is stopping", code="stopping", retry_s=5)


def _refused(refusal: Refusal) -> web.Response:
    kind = _KINDS.get(refusal.status, "server_error")
    response = json_response(
        answers.error(refusal.message, kind, refusal.param, refusal.code), status=refusal.status
    )
    if refusal.retry_s:
        response.headers["Retry-After"] = str(refusal.retry_s)
    if refusal.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response
