"""`python -m unitdist doctor [--config FILE] [--data DIR]`: what works on this machine, and what to do about the rest.

Under torchrun (`torchrun ... -m unitdist doctor`) every node is looked at, and versions and clocks are compared.
Exit code 0: no fault (notes and warnings may be there); 1: faults; 2: the command or the config cannot be used.
"""

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

from unitdist.config import Config
from unitdist.doctor import probes, screen
from unitdist.doctor.examine import examine, examine_node
from unitdist.doctor.finding import Finding
from unitdist.doctor.needs import Needs, needs_of
from unitdist.doctor.software import Torch
from unitdist.errors import ConfigError, TrainingError, UnitdistError
from unitdist.world import World, announce_world


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m unitdist", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="what works on this machine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument(
        "--config", "-c", metavar="FILE", help="look with the eyes of this training: loader, engine, disk"
    )
    doctor.add_argument(
        "--data", type=Path, metavar="DIR", help="data folder to look into (default: the config's data.path)"
    )
    doctor.add_argument(
        "--port", type=int, metavar="N", help="rendezvous port that has to be free (default: 29500, which may be busy)"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of the screen")
    doctor.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace keys of the config")
    parsed = parser.parse_args(arguments)
    if parsed.overrides and parsed.config is None:
        parser.error("section.key=value needs --config")
    if parsed.port is not None and not 0 < parsed.port < 65536:
        parser.error(f"--port: must be in 1..65535, got {parsed.port}")
    return parsed


def main() -> int:
    arguments = parse()
    try:
        config = _config(arguments)
        world = announce_world()
        torch = probes.torch_facts() if world.local_rank == 0 else None
        has_torch = torch is None or not torch.import_error
        needs = needs_of(config, data=arguments.data, has_torch=has_torch)
        if torch is None or has_torch:
            findings = _examine_job(needs, torch, world, port=arguments.port)
        else:  # nor can a word be had with other ranks
            findings = examine_node(needs, torch, world, port=arguments.port)
    except UnitdistError as error:
        if World.unread().local_rank == 0:
            print(f"unitdist: error: {error}", file=sys.stderr)
        return error.exit_code
    if world.is_main or not has_torch:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(screen.as_json(findings) if arguments.json else screen.as_text(findings, colour=colour))
    return 1 if screen.count(findings, "fault") else 0


def _examine_job(needs: Needs, torch: Torch | None, world: World, *, port: int | None) -> list[Finding]:
    """As `examine`, with a process group around it. Raises TrainingError where torch does not import."""
    if world.size == 1:
        return examine(needs, torch, world, port=port)
    try:
        import torch.distributed as dist  # late: where it fails, the first rank of the node says why
    except ImportError as error:
        raise TrainingError(f"rank {world.rank}: torch cannot be imported: {error}") from None
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    findings = examine(needs, torch, world, port=port)
    dist.destroy_process_group()
    return findings


def _config(arguments: argparse.Namespace) -> Config | None:
    if arguments.config is None:
        return None
    try:
        from unitdist.config_file import load_config
    except ImportError as error:
        raise ConfigError(f"--config needs PyYAML ({error}): pip install pyyaml") from None
    return load_config(arguments.config, arguments.overrides)


if __name__ == "__main__":
    sys.exit(main())
