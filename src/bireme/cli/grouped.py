"""A command whose options are the fields of dataclasses: for commands with too many to list twice.

@dataclass(frozen=True)
class Where:
    port: Annotated[int, typer.Option("--port", help="...")] = 8000

app.command("ask")(command(ask, Where))   # ask(Where(port=8000))
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def command(run: Callable[..., int | None], *groups: type) -> Callable[..., int | None]:
    """What typer takes: the fields of all groups as keywords; it calls `run` with one of each."""
    names = [[item.name for item in dataclasses.fields(group)] for group in groups]

    def called(**given: Any) -> int | None:
        return run(
            *(
                group(**{name: given[name] for name in own})
                for group, own in zip(groups, names, strict=True)
            )
        )

    parameters = [parameter for group in groups for parameter in _parameters(group)]
    vars(called)["__signature__"] = inspect.Signature(parameters)
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _parameters(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=item.default,
            annotation=hints[item.name],
        )
        for item in dataclasses.fields(group)
    ]
