"""The ledger of an engine in this process."""

from __future__ import annotations

from bireme.engine.host import EngineHost
from bireme.observe.ledger import Ledger, make_ledger
from bireme.observe.timeline import RankSpans
from bireme.parallel.mesh import Mesh


def ledger_of(host: EngineHost, start_ns: int, end_ns: int) -> Ledger:
    """Of a window of the monotonic clock, as far back as the ranks' rings reach."""
    widths = host.plan.config.parallel.widths
    ranks = []
    for rank, (name, spans) in enumerate(host.spans().items()):
        mesh = Mesh(widths, rank)
        ranks.append(RankSpans(name, mesh.stage, mesh.tp_rank, spans))
    return make_ledger(ranks, host.engine_spans(), start_ns=start_ns, end_ns=end_ns)
