"""Servers of the demo model that tests share; those that change or end one start their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served, serving

HERMES = """{% if tools %}{% for tool in tools %}<tool>{{ tool | tojson }}</tool>
{% endfor %}Call with <tool_call>{"name": ..., "arguments": ...}</tool_call>
{% endif %}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|eos|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture(scope="session")
def hermes_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("templates") / "hermes.jinja"
    path.write_text(HERMES)
    return path


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    with serving("--dtype", "float32", "--receive-timeout", "2") as running:
        yield running


@pytest.fixture(scope="session")
def piped() -> Iterator[Served]:
    """Of two stages."""
    with serving("--dtype", "float32", "-pp", "2") as running:
        yield running
