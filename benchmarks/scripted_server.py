"""The real front end in front of `scripted_engine.py`: `scripted_server.py PORT`."""

from __future__ import annotations

import sys
from pathlib import Path

from bireme.config import EngineConfig
from bireme.engine.client import EngineProcess
from bireme.server.config import ServerConfig
from bireme.server.run import serve
from bireme.server.sockets import listen

ENGINE = Path(__file__).with_name("scripted_engine.py")


def main() -> int:
    config = ServerConfig(port=int(sys.argv[1]), log_requests=False)
    engine = EngineConfig(max_num_seqs=256, max_num_waiting=1024)
    return serve(config, listen(config), EngineProcess("demo", engine, program=[str(ENGINE)]))


if __name__ == "__main__":
    sys.exit(main())
