"""The routes of KServe's open inference protocol, as one application."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from starlette.types import ASGIApp

from bireme import __version__
from bireme.server.config import ServerConfig
from bireme.server.errors import ApiError
from bireme.server.kserve.response import VERSION
from bireme.server.kserve.serving import ImageServing, default_name
from bireme.server.log import Log
from bireme.server.state import guarded, state_routes
from bireme.vision.client import ImageClient, ImageSettings

_EXTENSIONS = ["binary_tensor_data", "classification"]
_MODEL = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")


def make_image_serving(
    config: ServerConfig, settings: ImageSettings, log: Log
) -> tuple[ImageServing, ASGIApp]:
    """To be called on the loop that serves."""
    torch.set_num_threads(1)  # this process prepares images; the cores are the ranks'
    client = ImageClient(settings)
    serving = ImageServing(config, client, default_name(settings.model.name), log)
    app = FastAPI(root_path=config.root_path, openapi_url=None, docs_url=None, redoc_url=None)
    return serving, guarded(app, serving, (_routes(serving), state_routes(serving)))


def _routes(serving: ImageServing) -> APIRouter:
    router = APIRouter()

    @router.get("/v2")
    async def server() -> Response:
        return _json({"name": "bireme", "version": __version__, "extensions": _EXTENSIONS})

    @router.get("/v2/health/live")
    async def live() -> Response:
        return _json({"live": True})

    @router.get("/v2/health/ready")
    async def ready() -> Response:
        return _ready(serving, {})

    @_under_model(router.get, "/ready")
    async def model_ready(model: str, version: str = VERSION) -> Response:
        return _ready(serving, {"name": _checked(serving, model, version)})

    @_under_model(router.get)
    async def metadata(model: str, version: str = VERSION) -> Response:
        return _json(serving.metadata(_checked(serving, model, version)))

    @_under_model(router.post, "/infer")
    async def infer(request: Request, model: str, version: str = VERSION) -> Response:
        return await serving.infer(request, _checked(serving, model, version))

    return router


def _under_model(method: Callable[..., Any], path: str = "") -> Callable[..., Any]:
    """A route with a model's version in its path, and without."""

    def decorate(route: Callable[..., Any]) -> Callable[..., Any]:
        for start in _MODEL:
            method(start + path)(route)
        return route

    return decorate


def _checked(serving: ImageServing, model: str, version: str) -> str:
    """The model's name; ApiError 404 where there is no such model or version."""
    name = serving.check_model(model)
    if version != VERSION:
        raise ApiError(404, f"{name} has no version {version!r:.30}; its only one is {VERSION}")
    return name


def _ready(serving: ImageServing, told: dict[str, Any]) -> Response:
    is_ready = serving.is_ready and not serving.is_draining
    return _json({**told, "ready": is_ready}, 200 if is_ready else 503)


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
