"""What was said so far in a chat, and with whom it is: a server or a model in this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

Message = dict[str, str]


class TooLong(Exception):
    """The conversation leaves no room for an answer; says how long it is and how long it may be."""


@dataclass
class Conversation:
    """Turns alternate, the user's first. `system` comes before them and is never dropped."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.turns

    def ask(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})

    def close_turn(self, answer: str) -> None:
        """Keeps what was answered; a question without any answer is taken back."""
        if answer:
            self.turns.append({"role": "assistant", "content": answer})
        else:
            self.turns.pop()

    def drop_oldest(self) -> bool:
        """The oldest question and its answer; False where only the last question is left."""
        if len(self.turns) < 3:
            return False
        del self.turns[:2]
        return True


@dataclass(frozen=True, slots=True)
class Piece:
    """Of an answer as it comes."""

    text: str
    num_tokens: int


class Partner(Protocol):
    """Who answers. `begin` says a line or more about it; UserError where it cannot be talked to."""

    async def begin(self) -> list[str]: ...

    def answer(self, messages: list[Message]) -> AsyncGenerator[Piece]:
        """Raises TooLong before the first piece where turns must be dropped."""
        ...

    def busy_shares(self) -> Mapping[int, float]:
        """Of each stage's time since the answer began; empty where nobody knows."""
        ...

    async def end(self) -> None: ...
