"""Download MNIST, CIFAR-10 or CIFAR-100 into the layout that the loaders read.

From the addresses and with the checksums that torchvision knows. Nothing else in this project downloads a data set. An archive that is
there and whole is not downloaded again.
"""

import argparse
from pathlib import Path
from urllib.error import URLError

from torchvision.datasets import CIFAR10, CIFAR100, MNIST
from torchvision.datasets.utils import download_and_extract_archive

from unitdist.errors import DataError

CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", choices=("mnist", *CIFAR))
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="what data.path will name")


def run(options: argparse.Namespace) -> int:
    """Raises DataError when the server does not answer or what came is not the data set."""
    try:
        if options.dataset == "mnist":
            MNIST(str(options.output), download=True)
        else:  # CIFAR's files are pickles: torchvision's own reader would run what they say, ours does not
            source = CIFAR[options.dataset]
            download_and_extract_archive(source.url, str(options.output), md5=source.tgz_md5)
    # RuntimeError: torchvision's words for a wrong checksum, and for MNIST's mirrors all having failed.
    except (URLError, RuntimeError, EOFError, TimeoutError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{options.dataset} could not be downloaded ({reason}); try again, or put its files into {options.output} by hand"
        ) from error
    print(f"{options.dataset} is in {options.output}: data.path={options.output}")
    return 0
