"""Write, show and submit a SLURM job: launch/slurm/submit.py --config C --nodes N --gpus-per-node G [section.key=value ...].

The job goes on from its run folder's last.pt by itself, is requeued after a preemption and at its time limit, and ends when
the run is finished or has failed for good. Exit code 2: something in the command cannot be used.
"""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from unitdist.config import Config  # noqa: E402
from unitdist.config_file import find_config, load_config  # noqa: E402
from unitdist.errors import ConfigError, UnitdistError  # noqa: E402
from unitdist.train.batch_split import split_batch  # noqa: E402
from unitdist.world import World  # noqa: E402


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", "-c", required=True, metavar="FILE", help="as for launch/train.py")
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument(
        "--gpus-per-node", type=int, required=True, metavar="G", help="one rank a GPU; 0: one rank on CPUs"
    )
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument(
        "--time", default="24:00:00", metavar="D-HH:MM:SS", help="limit of one start (default: %(default)s)"
    )
    parser.add_argument("--cpus-per-gpu", type=int, metavar="N", help="default: data.num_threads + 2")
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="N", help="within one start (default: %(default)s)"
    )
    parser.add_argument(
        "--save-seconds",
        type=int,
        default=180,
        metavar="S",
        help="signal so long before the limit (default: %(default)s)",
    )
    parser.add_argument("--python", default=sys.executable, help="the interpreter on the nodes (default: this one)")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="more, such as --sbatch=--account=A"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the job script; write and submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(words)


def job_script(arguments: argparse.Namespace, config: Config) -> str:
    """train.sbatch with its {{fields}} filled in. Raises ConfigError for what the training would refuse on so many ranks."""
    processes = max(1, arguments.gpus_per_node)
    if arguments.nodes < 1 or arguments.gpus_per_node < 0 or arguments.max_restarts < 0 or arguments.save_seconds < 60:
        raise ConfigError("--nodes >= 1, --gpus-per-node >= 0, --max-restarts >= 0 and --save-seconds >= 60 are needed")
    split_batch(config, World(rank=0, local_rank=0, size=arguments.nodes * processes, local_size=processes))
    more = [f"--partition={arguments.partition}"] if arguments.partition else []
    fields = {
        "name": config.run.name,
        "nodes": arguments.nodes,
        "gpus_per_node": arguments.gpus_per_node,
        "processes_per_node": processes,
        "cpus_per_node": processes * (arguments.cpus_per_gpu or config.data.num_threads + 2),
        "time": arguments.time,
        "run_folder": run_folder(config),
        "save_seconds": arguments.save_seconds,
        "patience_seconds": arguments.save_seconds - 30,
        "more_options": "\n".join(f"#SBATCH {option}" for option in [*more, *arguments.sbatch]) or "#",
        "repository": shlex.quote(str(REPOSITORY)),
        "python": shlex.quote(arguments.python),
        "max_restarts": arguments.max_restarts,
        "train_arguments": shlex.join(["--config", str(find_config(arguments.config).resolve()), *arguments.overrides]),
    }
    template = Path(__file__).with_name("train.sbatch").read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda match: str(fields[match[1]]), template).replace("\n#\n#", "\n#")


def run_folder(config: Config) -> Path:
    """Where the run will be, from the repository as the job sees it. Raises ConfigError for a path SLURM cannot take."""
    folder = REPOSITORY / config.run.folder / (config.run.name or "run")
    if not re.fullmatch(r"[\w./+=:,-]+", str(folder)):
        raise ConfigError(
            f"run.folder: {folder} has characters that a job script cannot take; use letters, digits and -_./"
        )
    return folder


def main() -> None:
    arguments = parse_arguments()
    try:
        config = load_config(arguments.config, arguments.overrides)
        script = job_script(arguments, config)
        if arguments.dry_run:
            print(script, end="")
            return
        file = run_folder(config) / "job.sbatch"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(script)
        print(f"{file}\n{script}", flush=True)
        sys.exit(subprocess.run(["sbatch", str(file)], stdin=subprocess.DEVNULL).returncode)
    except UnitdistError as error:
        sys.exit(print(f"submit.py: error: {error}", file=sys.stderr) or error.exit_code)
    except FileNotFoundError as error:
        sys.exit(
            f"submit.py: error: {error.filename}: not found; submit from a machine with SLURM's sbatch, or use --dry-run"
        )


if __name__ == "__main__":
    main()
