"""The real front end in front of `scripted_engine.py`: `scripted_server.py PORT`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from bireme.config import EngineConfig
from bireme.engine.client import EngineProcess
from bireme.server.app import make_serving
from bireme.server.config import ServerConfig
from bireme.server.run import serve
from bireme.server.sockets import listen

ENGINE = Path(__file__).with_name("scripted_engine.py")


def main() -> int:
    config = ServerConfig(port=int(sys.argv[1]), log_requests=False)
    engine = EngineConfig(max_num_seqs=256, max_num_waiting=1024)
    sock = listen(config)
    process = EngineProcess("demo", engine, program=[str(ENGINE)])
    try:
        return serve(config, sock, partial(make_serving, config, process))
    finally:
        process.close()


if __name__ == "__main__":
    sys.exit(main())
