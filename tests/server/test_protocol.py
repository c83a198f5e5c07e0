"""What clients send is refused at its first fault: a body of a million of them must cost no more."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from bireme.server.protocol.chat import ChatCompletionRequest
from bireme.server.protocol.completions import CompletionRequest
from bireme.server.protocol.responses import ResponsesRequest
from bireme.server.protocol.tokenize import DetokenizeRequest, TokenizeRequest

MANY = [None] * 1000
HELLO = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {"prompt": MANY}),
        (CompletionRequest, {"prompt": [MANY]}),
        (CompletionRequest, {"prompt": "x", "stop": MANY}),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": MANY}),
        (CompletionRequest, {"prompt": "x", "structured_outputs": {"choice": MANY}}),
        (ChatCompletionRequest, {"messages": MANY}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": MANY}]}),
        (ChatCompletionRequest, {"messages": [{"role": "assistant", "tool_calls": MANY}]}),
        (ChatCompletionRequest, {"messages": HELLO, "tools": MANY}),
        (ResponsesRequest, {"input": MANY}),
        (ResponsesRequest, {"input": [{"content": MANY}]}),
        (ResponsesRequest, {"input": "x", "tools": MANY}),
        (ResponsesRequest, {"input": "x", "include": MANY}),
        (TokenizeRequest, {"messages": MANY}),
        (DetokenizeRequest, {"tokens": MANY}),
    ],
)
def test_a_list_of_faults_is_one_fault(model: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as found:
        model.model_validate(body)
    assert found.value.error_count() <= 4  # one a way to read it
