"""Are the files right?"""

from __future__ import annotations

from collections.abc import Iterator

from bireme.doctor.evidence import Evidence
from bireme.doctor.finding import Finding


def damaged_files(found: Evidence) -> Iterator[Finding]:
    if found.damage:
        yield Finding(
            rule="damaged-files",
            title="the files are not the model's",
            figure=found.damage[0] + _more(len(found.damage) - 1),
            remedy="shard the source again, or copy the artifact anew",
            share=1.0,
        )


def wrong_model(found: Evidence) -> Iterator[Finding]:
    if found.departures:
        yield Finding(
            rule="wrong-model",
            title="the cut model computes something else than the whole one",
            figure=found.departures[0] + _more(len(found.departures) - 1),
            remedy="shard the source again, then bireme verify",
            share=1.0,
        )


def _more(num: int) -> str:
    return f" (and {num} more)" if num > 0 else ""
