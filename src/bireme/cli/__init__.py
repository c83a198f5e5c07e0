"""The `bireme` command: one short file a subcommand; each parses, builds a config, calls one function."""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

import typer

from bireme import __version__
from bireme.cli import (
    bench,
    chat,
    doctor,
    export,
    generate,
    inspect,
    ledger,
    pipeline,
    probe,
    profile,
    report,
    serve,
    shard,
    verify,
)  # fmt: skip
from bireme.cli.config_file import FromEnvironment
from bireme.errors import EngineError, RankError, UserError

UsageError: Any = typer.BadParameter.__bases__[
    0
]  # typer carries click's exceptions under its own name

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

app = typer.Typer(
    name="bireme",
    help="Run one language model on many devices: cut it, shard it, generate, and prove it is the same model.\n\n"
    "Exit status: 0; 1 where something is damaged, differs or broke while running; 2 for what you can mend; "
    "130 for Ctrl-C.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True
    ),
) -> None:
    if version:
        typer.echo(f"bireme {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
    else:
        return
    raise typer.Exit


for module in (
    generate,
    chat,
    pipeline,
    inspect,
    shard,
    export,
    verify,
    ledger,
    profile,
    doctor,
    report,
    probe,
):
    app.command(module.NAME, help=module.__doc__, short_help=module.SHORT)(module.run)
app.command(
    serve.NAME,
    cls=FromEnvironment,
    help=serve.__doc__,
    short_help=serve.SHORT,
    context_settings={"auto_envvar_prefix": "BIREME_SERVE"},
)(serve.run)
app.add_typer(bench.app, name=bench.NAME, short_help=bench.SHORT)


def main() -> None:
    """Runs the command; exit status 2 for what the user can mend, 1 for what broke, 130 for Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    sys.exit(run(sys.argv[1:]))


def _end(number: int, _frame: object) -> None:
    """What is open is closed on the way out: ranks, temporary folders."""
    raise SystemExit(128 + number)


def run(arguments: list[str]) -> int:
    """The exit status of one command line."""
    try:
        status = typer.main.get_command(app).main(
            arguments, prog_name="bireme", standalone_mode=False, obj=arguments
        )
    except UsageError as error:
        hint = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
        return _say(f"{error.format_message().rstrip('.')}{_given(error)}{hint}", 2)
    except UserError as error:
        return _say(str(error), 2)
    except RankError as error:
        return _say(f"{error.traceback}{error}", 1)
    except EngineError as error:
        return _say(str(error), 1)
    except BrokenPipeError:
        return 141  # the reader of a pipe went away, as `head` does
    except OSError as error:
        if error.filename is None and error.errno in _FULL:
            return _full(error)
        if error.filename is None:
            raise
        return _say(f"{error.filename}: {error.strerror}", 2)
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", 130)
    return status if isinstance(status, int) else 0


def _given(error: Exception) -> str:
    """The value that a message of pydantic's, which typer hands on, does not show."""
    errors = getattr(error.__cause__, "errors", None)
    return f", not {errors()[0]['input']!r}" if errors else ""


def _full(error: OSError) -> int:
    """What standard output still holds is dropped, or Python would fail on it again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _say(f"cannot write the output: {error.strerror}", 1)


def _say(text: str, status: int) -> int:
    print(f"bireme: {text}" if status != 1 else text, file=sys.stderr)
    return status
