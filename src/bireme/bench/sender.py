"""Sends queries to a server and times what is streamed back.

The body is encoded before the request is due and the answer is read as it comes, so that little of
the generator's own work lies between two clock readings.
"""

from __future__ import annotations

import time
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from bireme.bench.answer import Answer
from bireme.bench.client import Client
from bireme.bench.load import Progress, Send
from bireme.bench.queries import Queries
from bireme.bench.streamed import AnswerReader, StreamError


@dataclass(frozen=True)
class Sender:
    """`progress` counts pieces of answers as they come; their texts are kept if it is asked for."""

    client: Client
    queries: Queries
    progress: Progress
    keeps_text: bool = False

    def prepare(self, index: int) -> Send:
        query = self.queries.query(index)
        body = self.client.target.body(self.client.model, query)
        return partial(self._send, body, query.input_len)

    async def _send(self, body: bytes, num_input_tokens: int) -> Answer:
        """The answer; errors of the server and of the network are in it."""
        clock = time.perf_counter
        reader = AnswerReader(num_input_tokens, clock(), keeps_text=self.keeps_text)
        try:
            async with aclosing(self.client.stream(body)) as events:
                async for data in events:
                    self.progress.num_pieces += reader.take(data, clock())
        except StreamError as error:
            return reader.answer(str(error))
        return reader.answer()
