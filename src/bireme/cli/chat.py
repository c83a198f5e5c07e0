"""Talk with a model in the terminal, or with a server at a URL.

Answers stream, with tokens a second in the margin, and each stage's busy share where the server counts
it. /help lists what else can be typed. Ctrl-C stops an answer, Ctrl-D leaves.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Annotated

import typer

from bireme.cli import options
from bireme.cli.conversation import Conversation, Partner, TooLong
from bireme.cli.grouped import flattened
from bireme.cli.margin import MarginWriter
from bireme.errors import BiremeError, RequestError

NAME = "chat"
SHORT = "Talk with a model or a server."
_HELP = """\
/reset        forget what was said
/system TEXT  what the model is told before the conversation; without TEXT nothing
/exit         leave, as Ctrl-D does
/help         this list"""


@dataclass(frozen=True)
class Who:
    """The partner, and how it is to answer."""

    partner: Annotated[
        str, typer.Argument(metavar="[MODEL|URL]", help="A model, or a server's http://...")
    ] = "demo"
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="Said before the conversation.")
    ] = None
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", help="Tokens of an answer at most.")
    ] = 256
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the likeliest tokens of this probability.")
    ] = 1.0
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print answers alone.")] = False

    def __post_init__(self) -> None:
        options.check_at_least("max_tokens", self.max_tokens, 1)


@dataclass(frozen=True)
class Server:
    """Of a URL alone."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="NAME", help="As the server names it. [default: its first]"
        ),
    ] = None
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", metavar="KEY", help="Sent as a bearer token.", envvar="OPENAI_API_KEY"
        ),
    ] = None


@flattened
def run(who: Who, server: Server, engine: options.EngineOptions) -> int:
    partner = _partner(who, server, engine)
    with asyncio.Runner() as runner:
        try:
            told = runner.run(partner.begin())
            if not who.quiet:
                print(*told, sep="\n", file=sys.stderr)
            return _Chat(runner, partner, Conversation(who.system), who.quiet).run()
        finally:
            runner.run(partner.end())


def _partner(who: Who, server: Server, engine: options.EngineOptions) -> Partner:
    from bireme.cli.chat_partners import ModelPartner, ServerPartner

    sampling = {"temperature": who.temperature, "top_p": who.top_p, "seed": who.seed}
    if not who.partner.startswith(("http://", "https://")):
        options.check_no_address(who.partner)
        if server.model:
            raise RequestError("--model names one of a server's models; give its http://... first")
        from bireme.engine.async_llm import AsyncLLM

        llm = AsyncLLM(who.partner, **{"max_num_seqs": 1, **engine.keywords()})
        return ModelPartner(llm, who.max_tokens, **sampling)
    if engine != options.EngineOptions():
        raise RequestError(
            f"{who.partner} has its layout and its devices already; leave those options out"
        )
    from bireme.bench.client import ENDPOINTS, Target

    target = Target(
        base_url=who.partner,
        endpoint=ENDPOINTS[1],
        model=server.model,
        headers={"Authorization": f"Bearer {server.api_key}"} if server.api_key else {},
        extra_body={name: value for name, value in sampling.items() if value is not None},
    )
    return ServerPartner(target, who.max_tokens)


@dataclass
class _Figures:
    """Of the answer that streams."""

    partner: Partner
    start_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    num_tokens: int = 0

    def count(self, num_tokens: int) -> None:
        self.first_s = self.first_s or time.monotonic()
        self.num_tokens += num_tokens

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / (time.monotonic() - self.start_s)

    def in_margin(self, line: int) -> str:
        """Lines take turns: the rate, then each stage."""
        shares = self.partner.busy_shares()
        figures = [f"{self.tokens_per_s:.1f} tokens/s"]
        figures += [f"stage {stage} {share:.0%} busy" for stage, share in shares.items()]
        return figures[line % len(figures)]

    def in_all(self) -> str:
        if self.first_s is None:
            return "no token"
        shares = self.partner.busy_shares()
        busy = ", ".join(f"stage {stage} {share:.0%} busy" for stage, share in shares.items())
        first_ms = (self.first_s - self.start_s) * 1000
        return (
            f"{self.num_tokens} tokens; first after {first_ms:.0f} ms, "
            f"{self.tokens_per_s:.1f} tokens/s{busy and '; ' + busy}"
        )


@dataclass
class _Chat:
    """One conversation, from the first line to the last. Without a terminal: no prompts, plain text."""

    runner: asyncio.Runner
    partner: Partner
    conversation: Conversation
    quiet: bool
    has_failed: bool = False

    def run(self) -> int:
        """1 if an answer failed, and nobody was there to see it."""
        is_typed = sys.stdin.isatty() and sys.stdout.isatty()
        if is_typed and not self.quiet:
            print("/help lists what can be typed; Ctrl-D leaves", file=sys.stderr)
        for line in _typed_lines() if is_typed else _piped_lines():
            if line.startswith("/"):
                if not self._obey(line):
                    break
            elif line.strip():
                self._talk(line)
        return int(self.has_failed and not is_typed)

    def _obey(self, line: str) -> bool:
        """False to leave."""
        name, _, rest = line.strip().partition(" ")
        match name:
            case "/exit" | "/quit":
                return False
            case "/reset":
                self.conversation.turns.clear()
                self._note("forgotten")
            case "/system":
                self.conversation.system = rest.strip() or None
                self._note("the system message is set" if rest.strip() else "no system message")
            case "/help":
                print(_HELP)
            case _:
                self._note(f"there is no {name}; /help lists what there is")
        return True

    def _talk(self, line: str) -> None:
        """One turn. Ctrl-C keeps what was answered so far."""
        self.conversation.ask(line)
        said: list[str] = []
        try:
            self.runner.run(self._answer(said))
        except KeyboardInterrupt:
            self._note("stopped")
        except (BiremeError, TooLong) as error:
            self.has_failed = True
            print(f"bireme: {error}", file=sys.stderr)
        self.conversation.close_turn("".join(said))

    async def _answer(self, said: list[str]) -> None:
        """Drops the oldest turns until the rest fits."""
        while True:
            try:
                return await self._stream(said)
            except TooLong as error:
                if said or not self.conversation.drop_oldest():
                    raise
                self._note(f"{error}; the oldest turn was dropped")

    async def _stream(self, said: list[str]) -> None:
        figures = _Figures(self.partner)
        writer = _writer(figures)
        try:
            async with aclosing(self.partner.answer(self.conversation.messages())) as pieces:
                async for piece in pieces:
                    figures.count(piece.num_tokens)
                    said.append(piece.text)
                    writer.write(piece.text)
        finally:
            writer.close()
        self._note(figures.in_all())

    def _note(self, text: str) -> None:
        if not self.quiet:
            print(f"  {text}", file=sys.stderr)


class _PlainWriter:
    """What a pipe or a file gets: the text, and an end of line behind it."""

    def __init__(self) -> None:
        self._is_open = False

    def write(self, text: str) -> None:
        print(text, end="", flush=True)
        self._is_open = True

    def close(self) -> None:
        if self._is_open:
            print(flush=True)


def _writer(figures: _Figures) -> MarginWriter | _PlainWriter:
    if not sys.stdout.isatty():
        return _PlainWriter()
    columns = shutil.get_terminal_size().columns
    return MarginWriter(sys.stdout, columns, figures.in_margin)


def _typed_lines() -> Iterator[str]:
    """Ctrl-C drops the line that is being typed; Ctrl-D ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _piped_lines() -> Iterator[str]:
    return (line.rstrip(os.linesep) for line in sys.stdin)
