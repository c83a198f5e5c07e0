"""What a rule found."""

from __future__ import annotations

import msgspec

PAGE = "docs/doctor.md"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`rule` is a section of `PAGE`; `share` of the ranks' time is at stake, 1 where nothing else that was
    measured can be trusted before this is mended."""

    rule: str
    title: str
    figure: str
    remedy: str
    share: float

    @property
    def page(self) -> str:
        return f"{PAGE}#{self.rule}"
