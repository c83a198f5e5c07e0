"""`/tokenize`, `/detokenize` and `/tokenizer_info`."""

from __future__ import annotations

import asyncio

from fastapi.responses import Response

from bireme.engine.input_processor import InputProcessor
from bireme.errors import RequestError
from bireme.server.conversation import template_messages, template_variables
from bireme.server.errors import ApiError, FieldNames
from bireme.server.protocol.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from bireme.server.serving import Serving


async def tokenize(serving: Serving, wanted: TokenizeRequest) -> Response:
    serving.check_model(wanted.model)
    serving.note_unknown("/tokenize", wanted.model_extra)
    if (wanted.prompt is None) == (wanted.messages is None):
        raise ApiError(400, "give either a prompt or messages")
    with FieldNames("messages" if wanted.prompt is None else "prompt").used():
        body = await asyncio.to_thread(_tokenized, serving.inputs, wanted)
    return Response(body, media_type="application/json")


def _tokenized(inputs: InputProcessor, wanted: TokenizeRequest) -> bytes:
    ids = _ids(inputs, wanted)
    return TokenizeResponse(
        count=len(ids),
        max_model_len=inputs.model.max_model_len,
        tokens=ids,
        token_strs=list(map(inputs.tokenizer.name_of, ids)) if wanted.return_token_strs else None,
    ).as_json()


def _ids(inputs: InputProcessor, wanted: TokenizeRequest) -> list[int]:
    if wanted.messages is None:
        has_special = wanted.add_special_tokens is not False
        if not wanted.prompt:
            return inputs.tokenizer.encode("", add_special_tokens=has_special)
        return inputs.encode(wanted.prompt, "prompt", add_special_tokens=has_special)
    goes_on = bool(wanted.continue_final_message)
    return inputs.chat_ids(
        template_messages(wanted.messages),
        **template_variables(wanted.chat_template_kwargs),
        tools=[tool.model_dump(exclude_none=True) for tool in wanted.tools or []] or None,
        add_generation_prompt=wanted.add_generation_prompt is not False and not goes_on,
        continue_final_message=goes_on,
    )


async def detokenize(serving: Serving, wanted: DetokenizeRequest) -> Response:
    serving.check_model(wanted.model)
    serving.note_unknown("/detokenize", wanted.model_extra)
    with FieldNames("tokens").used():
        body = await asyncio.to_thread(_detokenized, serving.inputs, wanted.tokens)
    return Response(body, media_type="application/json")


def _detokenized(inputs: InputProcessor, ids: list[int]) -> bytes:
    most = inputs.model.max_model_len
    if len(ids) > most:
        raise RequestError(f"tokens has {len(ids)} ids; the context holds {most}, so send fewer")
    bad = [id_ for id_ in ids if not 0 <= id_ < inputs.model.vocab_size]
    if bad:
        raise RequestError(
            f"tokens={bad[0]} is no id; ids go from 0 to {inputs.model.vocab_size - 1}"
        )
    text = inputs.tokenizer.decode(ids, skip_special_tokens=False)
    return DetokenizeResponse(prompt=text).as_json()


def tokenizer_info(serving: Serving) -> TokenizerInfo:
    inputs = serving.inputs
    tokenizer = inputs.tokenizer
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": inputs.model.vocab_size,
        "model_max_length": inputs.model.max_model_len,
        **tokenizer.special_tokens,
        "chat_template": tokenizer.chat_template,
    }
    return TokenizerInfo.model_validate(described)
