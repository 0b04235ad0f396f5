"""Prepare, check and measure image data: python tools/data.py VERB --help. docs/data.md tells when to use which."""

import argparse
import sys

from data_verbs import audit, bench, fetch, index, pack, prepare_train, prepare_val, scan, stats

from unitdist.errors import UnitdistError

VERBS = {
    "fetch": fetch,
    "scan": scan,
    "pack": pack,
    "index": index,
    "prepare-train": prepare_train,
    "prepare-val": prepare_val,
    "audit": audit,
    "stats": stats,
    "bench": bench,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, module in VERBS.items():
        summary = (module.__doc__ or "").split("\n")[0]
        module.add_arguments(verbs.add_parser(name, help=summary, description=module.__doc__))
    options = parser.parse_args()
    try:
        return int(VERBS[options.verb].run(options))
    except UnitdistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # its text names the file
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; scan and pack continue where they were when started again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
