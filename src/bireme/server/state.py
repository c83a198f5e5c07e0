"""What every server tells of itself, and what stands before its routes, whatever it serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, FastAPI, Query
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from bireme import __version__
from bireme.observe.told import NUM_COLUMNS
from bireme.server import openapi
from bireme.server.errors import ApiError, Handlers
from bireme.server.live import Viewing
from bireme.server.middleware import Gate
from bireme.server.openapi import ANY, answers, events
from bireme.server.page.routes import page_routes
from bireme.server.protocol.common import Health, Ledger, Load, Moment, RunSetup, Version
from bireme.server.service import Service


def guarded(app: FastAPI, service: Service, routers: Sequence[APIRouter]) -> ASGIApp:
    """The application with these routes and the page at `/`, behind its gate."""
    routers = [*routers, page_routes(has_keys=bool(service.config.api_keys))]
    for router in routers:
        app.include_router(router)
    routes = [route for router in routers for route in router.routes]
    Handlers(service.dialect, routes).install(app)
    gate = Gate(app, service)
    if not service.config.allowed_origins:
        return gate
    return CORSMiddleware(  # before the gate: browsers ask without a key whether they may ask
        gate,
        allow_origins=list(service.config.allowed_origins),
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "Retry-After"],
    )


def state_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["state"], responses=openapi.errors(*ANY))
    cannot: openapi.Responses = {503: {"model": Health, "description": "it cannot answer, and why"}}
    health_responses = answers(Health) | cannot

    @router.head("/health", include_in_schema=False)
    @router.get("/health", responses=health_responses)
    async def health() -> Response:
        """200 once every rank has made a step; 503 with what it is at before, or what broke."""
        return _health(service)

    @router.head("/ping", include_in_schema=False)
    @router.post("/ping", responses=health_responses, operation_id="ping_post")
    @router.get("/ping", responses=health_responses)
    async def ping() -> Response:
        """As /health, for those that expect it here."""
        return _health(service)

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        body, content_type = await service.metrics_text()
        return Response(body, media_type=content_type)

    @router.head("/version", include_in_schema=False)
    @router.get("/version", responses=answers(Version))
    async def version() -> Response:
        """Bireme's own."""
        return as_response(Version(version=__version__))

    @router.head("/load", include_in_schema=False)
    @router.get("/load", responses=answers(Load))
    async def load() -> Response:
        """How many requests are being served."""
        return as_response(Load(server_load=service.num_active))

    @router.get("/debug/setup", responses=answers(RunSetup, 503))
    async def setup() -> Response:
        """The model, its ranks with their devices, and what of the machine they depend on."""
        service.check_ready()
        return Response(
            msgspec.json.encode(service.engine.ready.result().setup), media_type="application/json"
        )

    @router.get("/debug/ledger", responses=answers(Ledger, 429, 503))
    async def ledger(
        seconds: Annotated[float, Query(gt=0, le=3600)] = 5.0,
        columns: Annotated[int, Query(ge=1, le=1000)] = NUM_COLUMNS,
    ) -> Response:
        """Where each rank's time went in the last seconds, as far back as its spans reach; in the last that
        the engine ran, where it broke."""
        if not service.ledger.is_there:
            raise ApiError(503, "no rank has written anything yet", code="loading")
        told = await service.ledger.last(seconds, columns, is_running=service.broken is None)
        return Response(told.as_json(), media_type="application/json")

    @router.get(
        "/debug/live",
        status_code=200,
        response_class=Viewing,
        responses=events(Moment, 429, 503),
    )
    async def live() -> Response:
        """What the page at / shows, about once a second, until the server shuts down: who waits, what the
        engine counts, and the ledger of the last steps, of at most a second."""
        return Viewing(service.live)

    return router


def as_response(model: Any) -> Response:
    return Response(model.as_json(), media_type="application/json")


def _health(service: Service) -> Response:
    told = service.health()
    return JSONResponse(told, 200 if told["status"] == "ready" else 503)
