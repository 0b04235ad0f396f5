"""Evaluate a checkpoint by the paper's protocols: python evaluation/multi_scale.py --checkpoint C --data DIR.

The same line under torchrun uses several processes; the report is the same, bit for bit. Exit code 2: something in the
command cannot be used; 1: anything else went wrong.
"""

import sys
from pathlib import Path

# Run as a script, Python puts this folder first; the packages lie one above.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from evaluation import TABLE_3_PROTOCOLS, evaluate  # noqa: E402
from evaluation.arguments import options_from_arguments, parser  # noqa: E402
from unitdist.train.agreement import reporting_errors  # noqa: E402
from unitdist.world import World, announce_world  # noqa: E402


def main() -> None:
    arguments = parser().parse_args()
    with reporting_errors(World.unread(), debug=arguments.debug):
        world = announce_world()
    with reporting_errors(world, debug=arguments.debug):
        evaluate(
            arguments.checkpoint,
            arguments.data,
            protocols=arguments.protocol or TABLE_3_PROTOCOLS,
            output=arguments.output,
            device=arguments.device,
            options=options_from_arguments(arguments),
        )


if __name__ == "__main__":
    main()
