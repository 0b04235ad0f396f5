"""Small files in the exact formats of ImageNet's downloads."""

import csv
import io
import random
import tarfile
from pathlib import Path

import numpy as np


def imagenet_downloads(folder: Path, sample_data: Path) -> dict[str, list[str]]:
    """Small files in the exact formats of ILSVRC2012_img_train.tar, _img_val.tar, _devkit_t12.tar.gz and the CSV.

    Returns {class: names of its validation images}.
    """
    from scipy.io import savemat

    classes = {"n01440764": "cat", "n01443537": "moon", "n04579145": "brick"}
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w", format=tarfile.USTAR_FORMAT) as outer:
        for wnid, name in classes.items():
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as inner:
                for number, path in enumerate(sorted((sample_data / "train" / name).iterdir())):
                    inner.add(path, arcname=f"{wnid}_{number}.JPEG")
            info = tarfile.TarInfo(f"{wnid}.tar")
            info.size = len(buffer.getvalue())
            outer.addfile(info, io.BytesIO(buffer.getvalue()))
    # ILSVRC2012_IDs are not in the order of the WordNet ids.
    ids = {"n01440764": 3, "n01443537": 1, "n04579145": 2}
    images = [(wnid, path) for wnid, name in classes.items() for path in sorted((sample_data / "val" / name).iterdir())]
    random.Random(0).shuffle(images)
    names: dict[str, list[str]] = {wnid: [] for wnid in classes}
    truth, rows = [], []
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, (wnid, path) in enumerate(images, 1):
            file_name = f"ILSVRC2012_val_{number:08d}.JPEG"
            archive.add(path, arcname=file_name)
            names[wnid].append(file_name)
            truth.append(str(ids[wnid]))
            rows.append((Path(file_name).stem, f"{wnid} 85 1 499 272 "))
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.array([(ids[wnid], wnid, name, 0) for wnid, name in classes.items()], dtype=kind)
    savemat(folder / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
    (folder / "truth.txt").write_text("\n".join(truth) + "\n")
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as devkit:
        devkit.add(folder / "meta.mat", "ILSVRC2012_devkit_t12/data/meta.mat")
        devkit.add(folder / "truth.txt", "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt")
    with open(folder / "LOC_val_solution.csv", "w", newline="") as file:
        csv.writer(file).writerows([("ImageId", "PredictionString"), *sorted(rows, reverse=True)])
    return names
