"""Make the sample data set: python tools/make_sample_data.py --output DIR [--seed 0]."""

import argparse
import sys
from pathlib import Path

from sample_data import make_sample_data


def main() -> int:
    parser = argparse.ArgumentParser(description="Cut a small ImageFolder of real photographs out of scikit-image's.")
    parser.add_argument("--output", type=Path, required=True, help="folder for train/, val/ and manifest.json")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    parser.add_argument("--train-per-class", type=int, default=60, help="training images of each of the 16 classes")
    parser.add_argument("--val-per-class", type=int, default=15, help="validation images of each class")
    parser.add_argument("--quiet", action="store_true", help="print the last line only")
    options = parser.parse_args()
    if options.train_per_class < 1 or options.val_per_class < 1:
        parser.error("--train-per-class and --val-per-class must be >= 1")
    try:
        files = make_sample_data(
            options.output,
            seed=options.seed,
            train_per_class=options.train_per_class,
            val_per_class=options.val_per_class,
            report=None if options.quiet else print,
        )
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(files)} images in {options.output}, listed with SHA-256 in {options.output / 'manifest.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
