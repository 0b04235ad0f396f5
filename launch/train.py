"""Train a network: `torchrun launch/train.py --config imagenet_r101_unit.yaml [section.key=value ...]`.

`python`, `torchrun`, `accelerate launch` and `deepspeed` all start this script; a bare config name is found in configs/.
Exit code 2: something in the command or config cannot be used; 75: stopped by a signal after saving (0 under torchrun); 1: anything
else went wrong.
"""

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unitdist.config import Config  # noqa: E402
from unitdist.config_file import describe_keys, dump_config, load_config  # noqa: E402
from unitdist.train.agreement import reporting_errors  # noqa: E402
from unitdist.train.parent import end_with_parent  # noqa: E402
from unitdist.world import World, announce_world  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"keys:\n{describe_keys()}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", "-c", required=True, metavar="FILE", help="YAML file, or the name of one in configs/"
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="auto: go on from the run folder's newest whole checkpoint if it holds any; or a checkpoint",
    )
    parser.add_argument("--data-dir", "--data-path", metavar="DIR", help="the same as data.path=DIR")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and leave")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what the job would do and leave; no GPU, no network"
    )
    parser.add_argument("--simulate-world", type=int, metavar="N", help="--dry-run: as if on N ranks")
    parser.add_argument("--simulate-local-world", type=int, metavar="G", help="--dry-run: as if G ranks on each node")
    parser.add_argument("--simulate-samples", type=int, metavar="N", help="--dry-run: as if N training images")
    parser.add_argument(
        "--end-with-parent",
        action="store_true",
        help="stop, saved, when the process that started this one is gone (ranks of a job always end with theirs)",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # what deepspeed's launcher adds
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace keys of the config")
    arguments = parser.parse_intermixed_args()
    if not arguments.dry_run and any(name.startswith("simulate") and value for name, value in vars(arguments).items()):
        parser.error("--simulate-world, --simulate-local-world and --simulate-samples are for --dry-run")
    return arguments


def print_dry_run(arguments: argparse.Namespace, config: Config) -> None:
    from unitdist.train.dry_run import dry_run, simulated_world

    world = simulated_world(arguments.simulate_world, arguments.simulate_local_world)
    if world.is_main:
        print(dry_run(config, world, num_samples=arguments.simulate_samples))


def main() -> None:
    arguments = parse_arguments()
    with reporting_errors(World.unread(), debug=arguments.debug):
        world = World.single() if arguments.dry_run else announce_world()
    if world.size > 1:
        end_with_parent()
    elif arguments.end_with_parent:
        end_with_parent(signal.SIGTERM)
    overrides = [*arguments.overrides, *([f"data.path={arguments.data_dir}"] if arguments.data_dir else [])]
    with reporting_errors(world, debug=arguments.debug):
        config = load_config(arguments.config, overrides)
        if arguments.print_config:
            print(dump_config(config), end="")
            return
        if arguments.dry_run:
            print_dry_run(arguments, config)
            return
        from unitdist.train.engine import stop_engine  # after the config is known to be good: this import takes seconds
        from unitdist.train.loop import train
        from unitdist.train.run_folder import finish_status

        folder = train(config, resume=arguments.resume)
        if config.evaluation.protocols:
            from evaluation.after_training import evaluate_run

            evaluate_run(config, folder, world)
            finish_status(folder, world)
        stop_engine()


if __name__ == "__main__":
    main()
