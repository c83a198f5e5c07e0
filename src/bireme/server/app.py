"""The routes: OpenAI's and vLLM's, as one FastAPI application."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from bireme import __version__
from bireme.errors import BiremeError, EngineError
from bireme.observe.told import NUM_COLUMNS
from bireme.server import errors, openapi, tokenization
from bireme.server.chat import chat
from bireme.server.completions import complete
from bireme.server.errors import ApiError, ClientGone
from bireme.server.json_route import JsonRoute
from bireme.server.middleware import OPEN_PATHS, Gate
from bireme.server.openapi import ANY, answers, streamed, tell_the_truth
from bireme.server.protocol.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
)
from bireme.server.protocol.common import Health, Ledger, Load, ModelCard, ModelList, Version
from bireme.server.protocol.completions import Completion, CompletionRequest
from bireme.server.protocol.responses import Event, ModelResponse, ResponsesRequest
from bireme.server.protocol.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from bireme.server.responses import answer
from bireme.server.serving import Serving


def make_app(serving: Serving) -> ASGIApp:
    """The application behind its gate; `serving` outlives it."""
    app = FastAPIOffline(
        title="Bireme",
        version=__version__,
        description="OpenAI's API for one language model that is cut over many devices.",
        redoc_url=None,
        root_path=serving.config.root_path,
        strict_content_type=False,
    )
    large = ThreadPoolExecutor(1, "large-bodies")
    routers = (_inference(serving, large), _state(serving))
    for router in routers:
        app.include_router(router)
    tell_the_truth(app, has_keys=bool(serving.config.api_keys), open_paths=OPEN_PATHS)
    routes = [route for router in routers for route in router.routes]
    handlers: dict[Any, Any] = {
        ApiError: errors.on_api_error,
        BiremeError: errors.on_bireme_error,
        StarletteHTTPException: partial(errors.on_http_error, routes),
        RequestValidationError: errors.on_invalid,
        ClientGone: errors.on_client_gone,
        Exception: errors.on_bug,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    gate = Gate(app, serving)
    if not serving.config.allowed_origins:
        return gate
    return CORSMiddleware(  # before the gate: browsers ask without a key whether they may ask
        gate,
        allow_origins=list(serving.config.allowed_origins),
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "Retry-After"],
    )


def _inference(serving: Serving, large: Executor) -> APIRouter:
    router = APIRouter(
        route_class=JsonRoute.on(large),
        tags=["inference"],
        responses=openapi.errors(*ANY, 408, 503),
    )
    generating = (404, 429)

    @router.post(
        "/v1/chat/completions",
        responses=streamed(answers(ChatCompletion, *generating), ChatCompletionChunk),
    )
    async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
        """Goes on with a conversation."""
        return await chat(request, serving, body)

    @router.post(
        "/v1/completions", responses=streamed(answers(Completion, *generating), Completion)
    )
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continues prompts."""
        return await complete(request, serving, body)

    @router.post(
        "/v1/responses",
        responses=streamed(answers(ModelResponse, *generating), Event, is_named=True),
    )
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        """Goes on with a conversation, whose items the client keeps: nothing is stored."""
        return await answer(request, serving, body)

    @router.post("/tokenize", responses=answers(TokenizeResponse, 404))
    async def tokenize(body: TokenizeRequest) -> Response:
        """The ids of a prompt or of a conversation."""
        return await tokenization.tokenize(serving, body)

    @router.post("/detokenize", responses=answers(DetokenizeResponse, 404))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of ids."""
        return await tokenization.detokenize(serving, body)

    @router.get("/tokenizer_info", responses=answers(TokenizerInfo))
    async def tokenizer_info() -> Response:
        """Special tokens and the chat template, for clients that count or render by themselves."""
        return _json(tokenization.tokenizer_info(serving))

    return router


def _state(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["state"], responses=openapi.errors(*ANY))
    cannot: openapi.Responses = {503: {"model": Health, "description": "it cannot answer, and why"}}
    health_responses = answers(Health) | cannot

    @router.head("/v1/models", include_in_schema=False)
    @router.get("/v1/models", responses=answers(ModelList, 503))
    async def models() -> Response:
        """The names of the one model."""
        cards = [_card(serving, name) for name in serving.model_names]
        return _json(ModelList(object="list", data=cards))

    @router.head("/v1/models/{model:path}", include_in_schema=False)
    @router.get("/v1/models/{model:path}", responses=answers(ModelCard, 404, 503))
    async def model(model: str) -> Response:
        """One of its names."""
        return _json(_card(serving, serving.check_model(model)))

    @router.head("/health", include_in_schema=False)
    @router.get("/health", responses=health_responses)
    async def health() -> Response:
        """200 once every rank has made a step; 503 with what it is at before, or what broke."""
        return _health(serving)

    @router.head("/ping", include_in_schema=False)
    @router.post("/ping", responses=health_responses, operation_id="ping_post")
    @router.get("/ping", responses=health_responses)
    async def ping() -> Response:
        """As /health, for those that expect it here."""
        return _health(serving)

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        body, content_type = await serving.metrics_text()
        return Response(body, media_type=content_type)

    @router.head("/version", include_in_schema=False)
    @router.get("/version", responses=answers(Version))
    async def version() -> Response:
        """Bireme's own."""
        return _json(Version(version=__version__))

    @router.head("/load", include_in_schema=False)
    @router.get("/load", responses=answers(Load))
    async def load() -> Response:
        """How many requests are being served."""
        return _json(Load(server_load=serving.num_active))

    @router.get("/debug/ledger", responses=answers(Ledger, 503))
    async def ledger(
        seconds: Annotated[float, Query(gt=0, le=3600)] = 5.0,
        columns: Annotated[int, Query(ge=1, le=1000)] = NUM_COLUMNS,
    ) -> Response:
        """Where each rank's time went in the last seconds, as far back as its spans reach."""
        if not serving.ledger.is_there:
            raise ApiError(503, "no rank has written anything yet", code="loading")
        told = await serving.ledger.last(seconds, columns)
        return Response(told.as_json(), media_type="application/json")

    return router


def _json(model: Any) -> Response:
    return Response(model.as_json(), media_type="application/json")


def _card(serving: Serving, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        object="model",
        created=serving.created,
        owned_by="bireme",
        root=serving.root,
        max_model_len=serving.inputs.model.max_model_len,
    )


def _health(serving: Serving) -> Response:
    if serving.is_draining:
        return JSONResponse({"status": "shutting down"}, 503)
    if (error := serving.broken) is not None:
        kind = "broken" if isinstance(error, EngineError) else "not started"
        return JSONResponse({"status": kind, "error": str(error)}, 503)
    if not serving.client.ready.done():
        return JSONResponse({"status": "loading", "doing": serving.client.doing}, 503)
    return JSONResponse({"status": "ready"})
