"""The engine in a process of its own, for a front end: `python -m bireme.engine.service SOCKET_FD`.

When the front end is gone this process ends at once, and its ranks with it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from bireme.engine.front_end import FrontEnd
from bireme.engine.service_loop import serve
from bireme.engine.service_messages import Progress, Start


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front end's to handle
    front_end = FrontEnd(socket.socket(fileno=int(sys.argv[1])))
    try:
        start = front_end.hear()
        assert isinstance(start, Start), "the first message says what to start"
        front_end.say(Progress(f"reading {start.model}"))
        serve(front_end, start)
    except EOFError:
        os._exit(0)
    except Exception as error:
        front_end.fail(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
