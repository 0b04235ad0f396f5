"""The paper's experiments: `python tools/paper.py run|table|plot EXPERIMENT`.

run: trains every arm and seed (resumable; in parallel on several GPUs) and collects the results. table: ours beside the
paper's; what was not run shows as "not run". plot: the figures, SVG and PNG.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from paper_experiments import EXPERIMENTS, find_experiment, select_arms  # noqa: E402
from paper_results import collect, find_results  # noqa: E402

from unitdist.errors import UnitdistError  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("action", choices=("run", "table", "plot"))
    option("experiment", help=", ".join(EXPERIMENTS))
    option("--data", metavar="DIR", help="run: the data set's folder")
    option("--arms", nargs="+", metavar="ARM", help="run: only these arms")
    option("--seeds", nargs="+", type=int, metavar="N", help="run: these seeds (default: the paper's number)")
    option("--jobs", type=int, metavar="N", help="run: at most N runs at a time (default: one per GPU, or 1)")
    option("--set", nargs="+", default=[], metavar="KEY=VALUE", help="run: overrides for every arm")
    option("--runs", type=Path, default=ROOT / "runs" / "paper", metavar="DIR", help="the run folders")
    option("--results", type=Path, default=ROOT / "docs" / "results", metavar="DIR", help="JSON and figures")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    experiment = find_experiment(arguments.experiment)
    if arguments.action == "run":
        from paper_run import run_experiment

        arms = select_arms(experiment, arguments.arms)
        seeds = arguments.seeds or list(range(experiment.num_seeds))
        failures = run_experiment(
            experiment, arms, seeds, arguments.runs, arguments.data, arguments.set, arguments.jobs
        )
        print(f"results in {collect(experiment, arguments.runs, arguments.results)}")
        return min(failures, 1)
    results = find_results(experiment, arguments.results)
    if arguments.action == "table":
        from paper_table import print_table

        print_table(experiment, results)
    else:
        from paper_plot import plot

        for path in plot(experiment, results, arguments.results):
            print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UnitdistError as error:
        print(f"paper.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
