"""Options that several commands share, as one dataclass in a command's signature."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def flattened(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with an option a field, in place of each parameter whose type is a dataclass."""
    hints = get_type_hints(run, include_extras=True)
    groups: dict[str, Any] = {
        name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(run).parameters.items():
        if name in groups:
            parameters += _options(groups[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name]))

    @functools.wraps(run)
    def grouped(**given: Any) -> Any:
        for name, kind in groups.items():
            own = [item.name for item in dataclasses.fields(kind)]
            given[name] = kind(**{item: given.pop(item) for item in own})
        return run(**given)

    signature = inspect.Signature(parameters)
    grouped.__signature__ = signature  # type: ignore[attr-defined]
    grouped.__annotations__ = {it.name: it.annotation for it in parameters}
    return grouped


def _options(kind: Any) -> list[inspect.Parameter]:
    """The fields of a dataclass, each of which has a default."""
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=item.default,
            annotation=hints[item.name],
        )
        for item in dataclasses.fields(kind)
    ]
