"""Options of a command from elsewhere: `--config`, a YAML or TOML file, under the names that they have on
the command line, and the environment."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from bireme.cli.prompts import read_text
from bireme.errors import ConfigError


class FromEnvironment(TyperCommand):
    """A command whose options have a variable each, of which its help says the rule alone."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for parameter in self.params:
            if isinstance(parameter, TyperOption):
                parameter.show_envvar = False
                # A variable is one value, whatever spaces are in it.
                parameter.envvar_list_splitter = "\0"  # type: ignore[misc]

    def invoke(self, ctx: Any) -> Any:
        """ConfigError names a variable that no option has, or that is empty."""
        prefix = f"{ctx.auto_envvar_prefix}_"
        known = {f"{prefix}{str(it.name).upper()}" for it in self.params}
        for name in sorted(os.environ):
            if name.startswith(prefix) and name not in known:
                raise ConfigError(
                    f"the environment gives {name:.80}, which is no option of {ctx.command_path}"
                    f"{_hint(name, known, prefix)}"
                )
            if name in known and not os.environ[name]:
                raise ConfigError(f"{name} is empty; give it a value, or unset it")
        return super().invoke(ctx)


def _hint(name: str, known: Collection[str], prefix: str = "") -> str:
    """The known name that is likest, if one is like it; all begin with `prefix`."""
    ends = [one.removeprefix(prefix) for one in known]
    likest = difflib.get_close_matches(name.removeprefix(prefix), ends, n=1, cutoff=0.7)
    return f"; did you mean {prefix}{likest[0]}?" if likest else ""


def _load(context: typer.Context, path: Path | None) -> Path | None:
    """Before the other options are read: what stands in the file becomes their default."""
    if path is not None:
        context.default_map = {**(context.default_map or {}), **_options(context, path)}
    return path


def _options(context: typer.Context, path: Path) -> dict[str, Any]:
    """ConfigError names the file and the option that there is not."""
    known = {
        name.lstrip("-"): parameter
        for parameter in context.command.params
        for name in parameter.opts
    }
    found = {}
    for key, value in _read(path).items():
        name = str(key).replace("_", "-")
        parameter = known.get(name)
        if parameter is None or parameter.name == "config":
            raise ConfigError(
                f"{path} gives {key!r:.80}, which is no option of {context.command_path}"
                f"{_hint(name, known)}"
            )
        found[str(parameter.name)] = _value(path, key, value, is_list=parameter.multiple)
    return found


def _value(path: Path, key: str, value: Any, *, is_list: bool) -> Any:
    """3,2 may be written as a list; where an option may be given repeatedly, one need be none."""
    if isinstance(value, dict) or value is None:
        raise ConfigError(
            f"{path} gives {key!r:.80} {value!r:.60}; write it as on the command line"
        )
    if is_list:
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str) for one in values):
            raise ConfigError(
                f"{path} gives {key!r:.80} something that is no text; put it in quotes"
            )
        return values
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _read(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        if path.suffix == ".toml":
            return tomllib.loads(text)
        import yaml

        value = yaml.safe_load(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # YAMLError is no ValueError, and is known once yaml is imported
        told = " ".join(str(error).split())
        raise ConfigError(f"{path} is no YAML: {told}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}; a table of options is needed")
    return value


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Options in YAML or TOML, named as here.",
        is_eager=True,
        callback=_load,
    ),
]
