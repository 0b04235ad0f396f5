"""Download MNIST, CIFAR-10 or CIFAR-100 into the layout that the loaders read.

From the addresses and with the checksums that torchvision knows. Nothing else in this project downloads a data set. An archive that is
there and whole is not downloaded again; one that is on its way is named FILE.part until its checksum is right.
"""

import argparse
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from torchvision.datasets import CIFAR10, CIFAR100, MNIST
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from unitdist.errors import DataError

CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
SILENCE_S = 60.0
"""So long a server may send nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", choices=("mnist", *CIFAR))
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="what data.path will name")


def run(options: argparse.Namespace) -> int:
    """Raises DataError when the server does not answer, breaks off, or what came is not the data set."""
    if options.dataset == "mnist":
        folder = options.output / "MNIST" / "raw"
        files = [(name, md5, [mirror + name for mirror in MNIST.mirrors]) for name, md5 in MNIST.resources]
    else:  # CIFAR's files are pickles: torchvision's own reader would run what they say, ours does not
        folder, source = options.output, CIFAR[options.dataset]
        files = [(source.filename, source.tgz_md5, [source.url])]
    folder.mkdir(parents=True, exist_ok=True)
    for name, md5, addresses in files:
        download(folder / name, md5, addresses)
        extract_archive(str(folder / name), str(folder))
    print(f"{options.dataset} is in {options.output}: data.path={options.output}")
    return 0


def download(file: Path, md5: str, addresses: Sequence[str]) -> None:
    """`file` from the first of the addresses that gives it with this checksum. Raises DataError with what each of them gave."""
    if check_integrity(file, md5):
        return
    part = file.with_name(file.name + ".part")
    refusals = []
    for address in addresses:
        try:
            with silence_ends_it():
                download_url(address, str(file.parent), filename=part.name, md5=md5)
            part.replace(file)
            return
        except (OSError, HTTPException, EOFError) as error:  # OSError: URLError, resets and time-outs too
            refusals.append(f"{address}: {reason_of(error)}")
        except RuntimeError:  # torchvision's word for a wrong checksum
            refusals.append(f"{address}: what came is incomplete or altered (checksum)")
    kept = f"; {part}, which is not whole, is not used" if part.exists() else ""
    raise DataError(
        f"{file.name} could not be downloaded from {'; nor from '.join(refusals)}{kept}. Run the same command again: it starts this "
        f"file anew and keeps those that are whole. Or put the archive into {file.parent} by hand"
    )


def reason_of(error: Exception) -> str:
    """In one line."""
    return f"{' '.join(str(error).split()) or 'no reason given'} ({type(error).__name__})"


@contextmanager
def silence_ends_it() -> Iterator[None]:
    """torchvision sets no time limit: a connection over which nothing comes would be waited for without end."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
