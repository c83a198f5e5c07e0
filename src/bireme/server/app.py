"""The routes: OpenAI's and vLLM's, as one FastAPI application."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor

from fastapi import APIRouter, Request
from fastapi.responses import Response
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp

from bireme import __version__
from bireme.engine.client import EngineClient, EngineProcess
from bireme.server import openapi, tokenization
from bireme.server.chat import chat
from bireme.server.completions import complete
from bireme.server.config import ServerConfig
from bireme.server.json_route import JsonRoute
from bireme.server.log import Log
from bireme.server.middleware import OPEN_PATHS
from bireme.server.openapi import ANY, answers, streamed, tell_the_truth
from bireme.server.protocol.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
)
from bireme.server.protocol.common import ModelCard, ModelList
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
from bireme.server.state import as_response, guarded, state_routes


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
    routers = (_inference(serving, large), _models(serving), state_routes(serving))
    guard = guarded(app, serving, routers)
    tell_the_truth(app, has_keys=bool(serving.config.api_keys), open_paths=OPEN_PATHS)
    return guard


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
        return as_response(tokenization.tokenizer_info(serving))

    return router


def _models(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["state"], responses=openapi.errors(*ANY))

    @router.head("/v1/models", include_in_schema=False)
    @router.get("/v1/models", responses=answers(ModelList, 503))
    async def models() -> Response:
        """The names of the one model."""
        cards = [_card(serving, name) for name in serving.model_names]
        return as_response(ModelList(object="list", data=cards))

    @router.head("/v1/models/{model:path}", include_in_schema=False)
    @router.get("/v1/models/{model:path}", responses=answers(ModelCard, 404, 503))
    async def model(model: str) -> Response:
        """One of its names."""
        return as_response(_card(serving, serving.check_model(model)))

    return router


def _card(serving: Serving, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        object="model",
        created=serving.created,
        owned_by="bireme",
        root=serving.root,
        max_model_len=serving.inputs.model.max_model_len,
    )


def make_serving(config: ServerConfig, process: EngineProcess, log: Log) -> tuple[Serving, ASGIApp]:
    """To be called on the loop that serves."""
    path = config.chat_template
    client = EngineClient(process, None if path is None else path.read_text("utf-8"))
    serving = Serving(config, client, process.model, log)
    return serving, make_app(serving)
