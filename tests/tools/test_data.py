"""tools/data.py: what all verbs share."""

from collections.abc import Callable
from pathlib import Path

RunData = Callable[..., tuple[int, str, str]]


def test_verbs_name_impossible_arguments_and_files(sample_data: Path, tmp_path: Path, run_data: RunData) -> None:
    for arguments, code, message in (
        (("scan", sample_data / "val", "--threads", 0), 2, "--threads and --max-megapixels must be >= 1"),
        (("scan", tmp_path / "none"), 2, f"data.path: no such folder: {tmp_path / 'none'}"),
        (("scan", sample_data / "val", "--output", tmp_path / "no" / "m.tsv"), 1, str(tmp_path / "no" / "m.tsv.part")),
        (("bench", sample_data, "--threads", 0), 2, "--threads must be >= 1"),
        (("bench", tmp_path), 2, "no folder, manifest or index of split train"),
        (("audit", sample_data, "--world", 0), 2, "--world, --batch and --epochs must be >= 1"),
        (("pack", sample_data / "val", "--output", tmp_path, "--quality", 0), 2, "--quality in 1..100"),
        (("index", tmp_path, "--kind", "webdataset"), 1, "holds no webdataset files"),
        (("prepare-train", tmp_path / "x.tar", "--output", tmp_path), 2, f"no such file: {tmp_path / 'x.tar'}"),
        (("prepare-val", tmp_path / "x.tar", "--labels", "l", "--output", "o"), 2, "no such file or folder"),
    ):
        found, _, error = run_data(*arguments)
        assert found == code and error.startswith("error: ") and message in error, (arguments, error)
