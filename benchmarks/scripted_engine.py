"""An engine process without ranks, for a front end to be measured by: `scripted_engine.py FD`.

The real scheduler and messages; tokens come from a script at once, or with BIREME_STALLED=1 never.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading

from bireme.checkpoint.prepared import prepare_model
from bireme.engine.engine import Engine
from bireme.engine.engine_loop import run_engine
from bireme.engine.front_end import FrontEnd
from bireme.engine.input_processor import InputProcessor, ServedModel
from bireme.engine.limits import SchedulerLimits
from bireme.engine.scheduler import Scheduler
from bireme.engine.scripted import ScriptedExecutor
from bireme.engine.service_loop import Commands
from bireme.engine.service_messages import Ready, Start, Stats
from bireme.engine.setup import Setup, num_cores
from bireme.parallel.layout import CacheKind
from bireme.request import StepOutput

CONTEXT = 1024


class Stalled(ScriptedExecutor):
    """Its first step never ends."""

    def wait(self, wake: int) -> bool:
        select.select([wake], [], [])
        return False

    def collect(self) -> StepOutput:
        threading.Event().wait()
        raise AssertionError("nobody sets it")


def main() -> None:
    front_end = FrontEnd(socket.socket(fileno=int(sys.argv[1])))
    start = front_end.hear()
    assert isinstance(start, Start)
    limits = SchedulerLimits(
        max_num_seqs=start.config.max_num_seqs,
        max_num_batched_tokens=start.config.max_num_batched_tokens,
        max_num_waiting=start.config.max_num_waiting,
        block_size=16,
        pp_size=1,
    )
    model = prepare_model(start.model)
    kinds = (CacheKind(None, start.config.max_num_seqs * CONTEXT // 16),)
    executor = Stalled({}) if os.environ.get("BIREME_STALLED") else ScriptedExecutor({})
    engine = Engine(Scheduler(limits, kinds), executor)
    served = ServedModel(start.model, model.folder, model.config.vocab_size, CONTEXT, frozenset())
    commands = Commands(front_end)
    commands.begin(InputProcessor(served), lambda: Stats(0, 0, 0.0, 0, 0, 0, []))
    threading.Thread(target=commands.follow, daemon=True).start()
    front_end.say(
        Ready(
            folder=str(model.folder),
            vocab_size=served.vocab_size,
            max_model_len=CONTEXT,
            eos_token_ids=frozenset(),
            most_requests=start.config.most_requests,
            most_tokens=start.config.most_tokens(CONTEXT),
            num_cache_tokens=CONTEXT * start.config.max_num_seqs,
            max_concurrency=float(start.config.max_num_seqs),
            told=["scripted"],
            setup=Setup(
                model=start.model,
                folder=None,
                dtype="none",
                transport="none",
                ranks=[],
                num_cores=num_cores(),
                environment={},
            ),
        )
    )
    run_engine(engine, commands.inbox, front_end)


if __name__ == "__main__":
    main()
