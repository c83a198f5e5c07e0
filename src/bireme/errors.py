"""The exception tree.

BiremeError
|-- UserError (also ValueError)      what the caller gave cannot work; the CLI exits with 2
|   |-- ConfigError                  a setting, a layout or a config.json
|   |-- CheckpointError              a file or a tensor of a checkpoint or an artifact
|   |-- CapacityError                a model or a request larger than what is there
|   `-- RequestError                 a prompt or a sampling parameter
`-- EngineError (also RuntimeError)  something broke while running; the CLI exits with 1
    |-- RankError                    one rank failed; carries its name and its traceback
    `-- PeerLost                     a collective or a transfer failed because a peer went away
"""

__all__ = [
    "BiremeError",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "PeerLost",
    "RankError",
    "RequestError",
    "UserError",
]


class BiremeError(Exception):
    """Root of everything that Bireme raises on purpose."""


class UserError(BiremeError, ValueError):
    """What the caller gave cannot work; one line says what was wrong and what would be right."""


class ConfigError(UserError):
    """A setting, a layout or a config.json that cannot work."""


class CheckpointError(UserError):
    """A missing, cut, corrupt or foreign checkpoint file or tensor."""


class CapacityError(UserError):
    """A model or a request larger than the devices."""


class RequestError(UserError):
    """A prompt or a sampling parameter that cannot be served."""


class EngineError(BiremeError, RuntimeError):
    """Something broke while running."""


class RankError(EngineError):
    """One rank failed. `rank_name` says which, `traceback` is its own, printed once."""

    def __init__(self, rank_name: str, cause: str, traceback: str = "") -> None:
        super().__init__(f"{rank_name}: {cause}")
        self.rank_name = rank_name
        self.cause = cause
        self.traceback = traceback


class PeerLost(EngineError):
    """A collective or a transfer failed because a peer went away or was too slow."""
