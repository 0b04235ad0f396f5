"""Evaluate a checkpoint by the paper's protocols: python evaluation/multi_scale.py --checkpoint C --data DIR.

The same line under torchrun uses several processes; the report is the same, bit for bit.
"""

import os
import sys
from pathlib import Path

# Run as a script, Python puts this folder first; the packages lie one above.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from evaluation import TABLE_3_PROTOCOLS, evaluate  # noqa: E402
from evaluation.arguments import options_from_arguments, parser  # noqa: E402
from unitdist.errors import UnitdistError  # noqa: E402


def main() -> int:
    arguments = parser().parse_args()
    try:
        evaluate(
            arguments.checkpoint,
            arguments.data,
            protocols=arguments.protocol or TABLE_3_PROTOCOLS,
            output=arguments.output,
            device=arguments.device,
            options=options_from_arguments(arguments),
        )
    except UnitdistError as error:
        if arguments.debug:
            raise
        # What all ranks meet is said by rank 0; what only one of them met (a note says so), by that one.
        if os.environ.get("RANK", "0") == "0" or getattr(error, "__notes__", None):
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
