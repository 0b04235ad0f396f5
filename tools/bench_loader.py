"""CPU cost of a training image: our DALI loader against torchvision. python tools/bench_loader.py [--data DIR]."""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from loader_measurements import (
    config_of,
    cpu_ms_per_image,
    graph_alone,
    images_per_second,
    noisy_set,
    our_loader,
    python_alone,
    stall_share,
    torchvision_pil,
    torchvision_tensors,
)

from sample_data import make_sample_data

KINDS = (our_loader, graph_alone, python_alone, torchvision_pil, torchvision_tensors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with train/<class>/ (default: made from the sample data)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved measurements of each case")
    parser.add_argument("--batches", type=int, default=6, help="batches of 64 images per measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = options.data
        if root is None:
            root = Path(folder)
            make_sample_data(root / "clean", seed=0, train_per_class=32, val_per_class=1)
            kilobytes = noisy_set(root / "clean" / "train", root, sigma=13, count=512)
            print(f"512 images of the sample data with sensor noise, {kilobytes:.0f} kB on average")
        print("| augmentation | our DALI loader | its graph alone | its Python alone | on Pillow | on tensors |")
        print("| --- | --- | --- | --- | --- | --- |")
        for augmentation in ("scale", "random_resized_crop"):
            config = config_of(root, augmentation)
            cases = {kind.__name__: kind(config) for kind in KINDS}
            cost = cpu_ms_per_image(cases, rounds=options.rounds, batches=options.batches)
            print(f"| {augmentation} | {' | '.join(f'{value:.3f} ms' for value in cost.values())} |")
            share, added = cost["our_loader"] / cost["torchvision_pil"], cost["python_alone"] / cost["graph_alone"]
            print(f"  {share:.2f} of torchvision on Pillow; our Python costs {100 * added:.1f} % of the graph")
        one, two = (images_per_second(our_loader(config_of(root, "scale", num_threads=n)), 16) for n in (1, 2))
        print(f"threads: one {one:.0f} images/s, two {two:.0f} images/s ({two / one:.2f} times; wall clock)")
        stalled = stall_share(our_loader(config_of(root, "scale", num_threads=2)), two, 16)
        print(f"a step 1.3 times slower than the loader waits {100 * stalled:.1f} % of the time (wall clock)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
