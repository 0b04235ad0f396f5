"""Compare runs: one self-contained HTML page, which opens offline.

python tools/report.py runs/unit_seed0 runs/unit_seed1 runs/bn_seed0 --output report.html
"""

import argparse
import sys
from pathlib import Path

from unitdist.wording import counted

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from report_page import build_page  # noqa: E402
from report_runs import read_runs  # noqa: E402

from unitdist.errors import ConfigError, UnitdistError  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, finished or not")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    parser.add_argument(
        "--evaluation",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a report.json that does not lie in its run's folder; the first is the first run's, and so on",
    )
    return parser.parse_args()


def write(arguments: argparse.Namespace) -> None:
    page = build_page(read_runs(arguments.runs, arguments.evaluation))
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: cannot write {arguments.output}: {error.strerror}") from None
    print(f"wrote {arguments.output} ({len(page) / 1024:,.0f} KiB, {counted(len(arguments.runs), 'run')})")


def main() -> int:
    arguments = parse()
    try:
        write(arguments)
    except UnitdistError as error:
        print(f"unitdist: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
