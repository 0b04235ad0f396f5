"""CPU cost of a training image: our DALI loader against torchvision. python tools/bench_loader.py [--data DIR]."""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from loader_measurements import noisy_set, print_report
from sample_data import make_sample_data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with train/<class>/ (default: made from the sample data)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved measurements of each case")
    parser.add_argument("--batches", type=int, default=8, help="batches of 64 per measurement, within an epoch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = options.data
        if root is None:
            root = Path(folder)
            make_sample_data(root / "clean", seed=0, train_per_class=32, val_per_class=1)
            kilobytes = noisy_set(root / "clean" / "train", root, sigma=13, count=512)
            print(f"512 images of the sample data with sensor noise, {kilobytes:.0f} kB on average")
        print_report(root, rounds=options.rounds, batches=options.batches)
    return 0


if __name__ == "__main__":
    sys.exit(main())
