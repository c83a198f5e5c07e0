"""Prove that the model, cut like this, is the whole model: every logit, in prefill and decode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bireme.cli import options

if TYPE_CHECKING:
    from bireme.checkpoint.prepared import PreparedModel

NAME = "verify"
SHORT = "Prove that the cut model is the whole model."


def run(
    model: options.Model,
    tp: options.TensorParallel = "1",
    pp: options.PipelineParallel = None,
    layers_per_stage: options.LayersPerStage = None,
    reference: Annotated[
        str, typer.Option("--reference", help="uncut (this engine on one rank) or transformers.")
    ] = "uncut",
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="A text to compare on; give it more than once for more."),
    ] = None,
    num_prompts: Annotated[
        int,
        typer.Option("--num-prompts", metavar="N", help="Made-up prompts, where no text is given."),
    ] = 4,
    num_decode: Annotated[
        int, typer.Option("--num-decode", metavar="N", help="Tokens to decode after each prompt.")
    ] = 32,
    dtype: options.DTypeOption = "auto",
    device: options.Device = "auto",
    devices: options.Devices = None,
    load_format: options.LoadFormat = "auto",
    max_model_len: options.MaxModelLen = None,
    as_json: options.JsonOutput = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Where to write the certificate. [default: beside an artifact]",
        ),
    ] = None,
) -> int:
    settings = options.engine_config(
        devices=devices,
        dtype=dtype,
        device=device,
        load_format=load_format,
        max_model_len=max_model_len,
    )
    parallel = options.parallel_config(tp, pp, layers_per_stage)
    if out is not None:
        options.check_writable(out, "certificate", options.is_certificate)
    from bireme.checkpoint.manifest import is_artifact, write_atomically
    from bireme.checkpoint.prepared import prepare_model
    from bireme.config import EngineConfig
    from bireme.verify import certificate_json, certificate_name, certificate_text, verify

    config = EngineConfig(parallel=parallel, **settings)
    prepared = prepare_model(model, needs_weights=config.load_format != "dummy")
    prompts = _prompts(prepared, prompt or [], num_prompts, config.max_num_seqs)
    is_beside = out is None and is_artifact(prepared.folder)
    if is_beside:
        options.check_folder(prepared.folder, prepared.folder)
    certificate = verify(prepared, config, prompts, num_decode=num_decode, reference=reference)
    typer.echo(certificate_json(certificate) if as_json else certificate_text(certificate))
    if is_beside:
        out = prepared.folder / certificate_name(certificate)
    if out is not None:
        write_atomically(out, certificate_json(certificate).encode() + b"\n")
    return 0 if certificate.is_same else 1


def _prompts(model: PreparedModel, texts: list[str], count: int, most: int) -> list[list[int]]:
    """The given texts, or ids drawn from a fixed seed: lengths from 5 to 60 tokens."""
    import random

    from bireme.errors import RequestError
    from bireme.text.tokenizer import Tokenizer, check_text

    if texts:
        if len(texts) > most:
            raise RequestError(
                f"{len(texts)} times --prompt was given; give it at most {most} times"
            )
        for index, text in enumerate(texts):
            check_text(text, f"prompt {index}")
        tokenizer = Tokenizer(model.folder)
        return [tokenizer.encode(text) for text in texts]
    if count < 1:
        raise RequestError(f"num_prompts={count} must be at least 1")
    if count > most:
        raise RequestError(f"num_prompts={count} exceeds {most}; give --num-prompts at most {most}")
    draw = random.Random(0)
    longest = max(6, min(60, model.config.max_model_len // 4))
    return [
        [draw.randrange(model.config.vocab_size) for _ in range(draw.randrange(5, longest))]
        for _ in range(count)
    ]
