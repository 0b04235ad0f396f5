"""Run a step again whose loss or gradient was not finite: python tools/replay_batch.py runs/NAME/nonfinite/step_00000017

Prints the loss and the gradient's norm, then and now, and the first module whose output is not finite. On the CPU, in one process.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unitdist.train.agreement import reporting_errors  # noqa: E402
from unitdist.train.nonfinite_batch import replay  # noqa: E402
from unitdist.world import World  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the step, with one rank_NNNN.pt a rank")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    with reporting_errors(World.single(), debug=arguments.debug):
        print(replay(arguments.folder))


if __name__ == "__main__":
    main()
