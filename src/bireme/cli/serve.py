"""Serve a model over HTTP: a language model in OpenAI's words, a vision model in KServe's.

MODEL is a folder, `demo` or a Hugging Face Hub id; or a vision model: a folder, resnet-50 or the like,
torchvision:NAME, timm:NAME or module:factory.

Every option can stand in a file (--config, YAML or TOML) or in the environment (BIREME_SERVE_PORT for
--port); the command line has the last word, the environment the next.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import typer

from bireme.cli import options
from bireme.cli.config_file import ConfigFile
from bireme.cli.grouped import flattened
from bireme.cli.server_options import ImageOptions, ServerOptions, check_kind
from bireme.config import EngineConfig, ParallelConfig
from bireme.errors import ConfigError

if TYPE_CHECKING:
    from bireme.vision.client import ImageSettings

NAME = "serve"
SHORT = "Serve a model over HTTP, in OpenAI's words or in KServe's."


@flattened
def run(
    context: typer.Context,
    model: options.Model,
    *,
    engine: options.EngineOptions,
    cache: options.CacheOptions,
    images: ImageOptions,
    server: ServerOptions,
    config: ConfigFile = None,
) -> None:
    from bireme.vision.naming import is_vision_model

    is_vision = is_vision_model(model)
    check_kind(context, model, is_vision=is_vision)
    if is_vision:
        raise typer.Exit(_serve_images(_image_settings(model, engine, cache, images), server))
    raise typer.Exit(_serve_language(model, *_engine_config(engine, cache), server))


def _serve_language(model: str, engine: EngineConfig, is_auto: bool, server: ServerOptions) -> int:
    settings = server.config(max_body_bytes="8MiB")
    from bireme.engine.client import EngineProcess
    from bireme.server.sockets import listen

    sock = listen(settings)
    process = EngineProcess(model, engine, is_auto=is_auto)
    try:  # the engine starts while this process imports what HTTP needs
        from bireme.server.app import make_serving
        from bireme.server.run import serve

        return serve(settings, sock, partial(make_serving, settings, process))
    finally:
        process.close()


def _serve_images(images: ImageSettings, server: ServerOptions) -> int:
    settings = server.config(max_body_bytes="64MiB")
    for name in settings.served_model_names:
        if "/" in name:
            raise ConfigError(
                f"served_model_name {name} has a slash, and is a part of KServe's paths"
            )
    from bireme.server.sockets import listen

    sock = listen(settings)
    from bireme.server.kserve.app import make_image_serving
    from bireme.server.run import serve

    return serve(settings, sock, partial(make_image_serving, settings, images))


def _image_settings(
    model: str, engine: options.EngineOptions, cache: options.CacheOptions, images: ImageOptions
) -> ImageSettings:
    points = [] if images.split is None else images.split.split(",")
    num_stages = options.num_stages(engine.pp, points, default=1)
    options.check_at_least("threads", 1 if images.threads is None else images.threads, 1)
    config = EngineConfig(
        parallel=ParallelConfig.of(1, num_stages),
        **options.engine_config(
            devices=engine.devices,
            memory_limit=engine.memory_limit,
            device=engine.device,
            gpu_memory_utilization=cache.gpu_memory_utilization,
        ),
    )
    from bireme.engine.joining import threads_per_rank
    from bireme.engine.prepare import device_memory, resolve_devices
    from bireme.vision.client import ImageSettings
    from bireme.vision.model import find_model
    from bireme.vision.pipeline import RankSettings

    devices = resolve_devices(config)
    return ImageSettings(
        model=find_model(
            model, None, images.weights, image_size=images.image_size, dtype=engine.dtype
        ),
        points=tuple(points),
        ranks=RankSettings(
            devices=devices, num_threads=images.threads or threads_per_rank(num_stages)
        ),
        limit_bytes=device_memory(config, devices).of_rank(num_stages),
        max_batch_size=images.max_batch_size,
        max_queue_delay_s=images.max_queue_delay_ms / 1e3,
        max_queue_size=images.max_queue_size,
    )


def _engine_config(
    engine: options.EngineOptions, cache: options.CacheOptions
) -> tuple[EngineConfig, bool]:
    """And whether the width is to be found."""
    given = engine.keywords() | cache.keywords()
    width = given.pop("tensor_parallel_size")
    is_auto = width == "auto"
    parallel = ParallelConfig.of(
        (1,) if is_auto else width,
        given.pop("pipeline_parallel_size"),
        given.pop("layers_per_stage"),
    )
    return EngineConfig(parallel=parallel, **given), is_auto
