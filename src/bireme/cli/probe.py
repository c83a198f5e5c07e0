"""Measure this machine and write what it can do to a file: how fast its devices multiply and move
memory, what a sum between ranks and a message from one to another take by size, what a launch and an
empty step cost, and how fast checkpoints are read from the page cache.

Everything goes through the rank processes, collectives and reader that inference uses, one rank a
device, all at work at once. It takes one to three minutes; run it while the machine has nothing else
to do. Figures are medians; the file keeps the tenth and ninetieth percentile beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bireme.cli import options
from bireme.cli.notes import note, note_if_busy
from bireme.cli.probe_report import print_report
from bireme.cli.progress import count_bar
from bireme.config import EngineConfig, ParallelConfig, format_bytes
from bireme.errors import CapacityError, RequestError

NAME = "probe"
SHORT = "Measure this machine, for plans."
_PROCESS_BYTES = 256 << 20  # of a rank that holds nothing: Python and torch


def run(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write, in TOML.")
    ] = Path("cluster.toml"),
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            metavar="N",
            help="Ranks that are measured, one a device; all GPUs, or 2 that share the cores, if not given.",
        ),
    ] = None,
    device: options.Device = "auto",
    devices: options.Devices = None,
    transport: Annotated[
        str,
        typer.Option(
            "--transport",
            help="auto: shared memory between ranks on a host's CPUs; distributed: gloo. GPUs have NCCL.",
        ),
    ] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="A few small sizes, in seconds: to try it out.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite FILE where it is there.")
    ] = False,
    as_json: options.JsonOutput = False,
) -> None:
    _check_out(out, force)
    from bireme.cluster.file import write_cluster
    from bireme.engine.prepare import resolve_devices
    from bireme.engine.setup import num_cores
    from bireme.planning.probe.plan import plan_for
    from bireme.planning.probe.probe import probe

    config = _config(ranks, device=device, devices=devices, transport=transport)
    chosen = resolve_devices(config)
    _check_memory(config, chosen)
    note_if_busy()
    if chosen[0] == "cpu" and len(chosen) > (cores := num_cores()):
        note(f"{len(chosen)} ranks share {cores} cores: figures are of ranks that take turns")
    plan = plan_for(chosen[0].partition(":")[0], is_quick=quick)
    with count_bar("measuring", plan.num_points(len(chosen))) as advance:
        cluster = probe(chosen, plan, lambda num_points: advance(num_points, 0), config.transport)
    write_cluster(out, cluster)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(cluster), indent=1))
    else:
        print_report(cluster)
        typer.echo(f"{out}: written")


def _check_memory(config: EngineConfig, devices: tuple[str, ...]) -> None:
    """CapacityError where the processes alone do not fit."""
    from bireme.engine.prepare import device_memory

    most = device_memory(config, devices).num_bytes // _PROCESS_BYTES
    if devices[0] == "cpu" and len(devices) > most:
        raise CapacityError(
            f"{len(devices)} ranks do not fit: a rank's process takes about "
            f"{format_bytes(_PROCESS_BYTES)}; use --ranks {most} at most"
        )


def _check_out(out: Path, force: bool) -> None:
    """To be told before the work."""
    if out.is_dir():
        raise RequestError(f"{out} cannot be written: it is a folder; name a file in it")
    if out.exists() and not force:
        raise RequestError(f"{out} is there already; name another file, or give --force")
    options.check_folder(out, out.absolute().parent)


def _config(ranks: int | None, **given: str | None) -> EngineConfig:
    """One rank a device; all GPUs, or two ranks on the CPU, where nothing says how many."""
    fields = options.engine_config(**given)
    if ranks is None:
        ranks = len(fields["devices"]) if "devices" in fields else _default_ranks(fields["device"])
    options.check_at_least("ranks", ranks, 1)
    return EngineConfig(parallel=ParallelConfig(widths=(ranks,)), **fields)


def _default_ranks(device: str) -> int:
    import torch

    num_gpus = 0 if device == "cpu" else torch.cuda.device_count()
    return num_gpus or 2
