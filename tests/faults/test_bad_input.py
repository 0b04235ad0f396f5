"""What a user gets wrong is one clear line: what, where, what to do; exit code 2 for what was typed, 1 otherwise."""

import shutil
import time
from pathlib import Path

import pytest
import torch

from tests.dist.launching import torchrun, train
from tests.faults.running import CONFIG, complaint, run_script


@pytest.fixture(scope="module")
def data(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sample data that a test may spoil."""
    folder = tmp_path_factory.mktemp("spoiled") / "data"
    shutil.copytree(sample_data, folder)
    (folder / "train" / "cat" / ".hidden.jpg").write_bytes(b"no image")
    (folder / "val" / "notes.txt").write_text("ignored, and counted")
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    code, _, error = run_script(
        ["--config", str(CONFIG), f"data.path={data}", f"run.folder={folder}", "run.name=a", "train.max_steps=2"]
    )
    assert code == 0, error
    return folder / "a"


def test_misspelt_key_names_the_nearest(data: Path, tmp_path: Path) -> None:
    message = complaint(2, "--config", str(CONFIG), "optim.learning_rat=0.1")
    assert message.startswith("unknown key optim.learning_rat")
    assert complaint(2, "--config", str(CONFIG), "train.epoch=1") == "unknown key train.epoch (did you mean epochs?)"


def test_wrong_type_says_what_is_expected() -> None:
    assert (
        complaint(2, "--config", str(CONFIG), "train.epochs=ten") == "train.epochs: expected a whole number, got 'ten'"
    )


def test_missing_data_folder_is_named(tmp_path: Path) -> None:
    message = complaint(2, "--config", str(CONFIG), f"data.path={tmp_path / 'nowhere'}", f"run.folder={tmp_path}")
    assert "no such folder" in message and str(tmp_path / "nowhere") in message


def test_empty_class_is_named(data: Path, tmp_path: Path) -> None:
    (data / "train" / "zebra").mkdir()
    try:
        message = complaint(1, "--config", str(CONFIG), f"data.path={data}", f"run.folder={tmp_path}")
    finally:
        (data / "train" / "zebra").rmdir()
    assert "1 of 17 classes hold no image: zebra" in message


def test_class_count_that_differs_from_the_model_is_named(data: Path, tmp_path: Path) -> None:
    message = complaint(
        2, "--config", str(CONFIG), f"data.path={data}", f"run.folder={tmp_path}", "model.num_classes=10"
    )
    assert message == f"model.num_classes: the model has 10 outputs, {data} has 16 classes"


def test_batch_that_does_not_divide_is_named(data: Path, tmp_path: Path) -> None:
    message = complaint(
        2, "--config", str(CONFIG), f"data.path={data}", f"run.folder={tmp_path}", "train.accumulation_steps=3"
    )
    assert message == "data.global_batch_size: 16 is not a multiple of 1 rank x 3 accumulation steps; nearest: 15 or 18"


def test_batch_larger_than_the_set_is_named(data: Path, tmp_path: Path) -> None:
    message = complaint(
        2, "--config", str(CONFIG), f"data.path={data}", f"run.folder={tmp_path}", "data.global_batch_size=256"
    )
    assert "0 steps per epoch" in message and "192" in message and "256" in message


def test_unknown_model_names_the_nearest(data: Path, tmp_path: Path) -> None:
    message = complaint(
        2, "--config", str(CONFIG), f"data.path={data}", f"run.folder={tmp_path}", "model.name=cifar_resnet21"
    )
    assert "cifar_resnet21" in message and "cifar_resnet20" in message


def test_missing_checkpoint_is_named(data: Path, tmp_path: Path) -> None:
    message = complaint(
        2, "--config", str(CONFIG), f"data.path={data}", f"run.folder={tmp_path}", "--resume", "nowhere.pt"
    )
    assert message == "--resume: no such checkpoint: nowhere.pt"


def test_checkpoint_of_another_model_is_refused(trained: Path, data: Path, tmp_path: Path) -> None:
    shared = [
        "--config",
        str(CONFIG),
        f"data.path={data}",
        f"run.folder={tmp_path}",
        "--resume",
        str(trained / "last.pt"),
    ]
    message = complaint(2, *shared, "model.norm=batchnorm")
    assert message.startswith(f"{trained / 'last.pt'} was made with model.norm: unitization, this run has batchnorm")
    message = complaint(2, *shared, "data.global_batch_size=32")
    assert "was made with data.global_batch_size: 16, this run has 32" in message
    victim = data / "train" / "coffee" / "coffee_0003.jpg"
    victim.rename(victim.with_name("other.jpg"))
    try:
        message = complaint(2, *shared)
    finally:
        victim.with_name("other.jpg").rename(victim)
    assert "was made on other data: the list of images (SHA-256 of names and labels) was " in message


def spoiled_checkpoint(trained: Path, tmp_path: Path, change) -> Path:
    content = torch.load(trained / "last.pt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "spoiled.pt")
    return tmp_path / "spoiled.pt"


def test_checkpoint_without_norm_divisors_is_refused(trained: Path, data: Path, tmp_path: Path) -> None:
    def drop(content: dict) -> None:
        content["model"] = {
            name: value for name, value in content["model"].items() if not name.endswith("norm_divisor")
        }

    path = spoiled_checkpoint(trained, tmp_path, drop)
    message = complaint(
        1, "--config", str(CONFIG), f"data.path={data}", f"run.folder={tmp_path}", "--resume", str(path)
    )
    assert message.startswith(f"{path} has no norm divisors (first: stem_norm.norm_divisor)")


def test_truncated_checkpoint_is_named_and_stays(trained: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    path.write_bytes((trained / "last.pt").read_bytes()[:5000])
    message = complaint(
        1, "--config", str(CONFIG), f"data.path={data}", f"run.folder={tmp_path}", "--resume", str(path)
    )
    assert message.startswith(f"{path} is damaged or not a checkpoint (5000 bytes")
    assert path.stat().st_size == 5000


def test_existing_run_is_not_overwritten(trained: Path, data: Path) -> None:
    before = (trained / "last.pt").read_bytes()
    message = complaint(2, "--config", str(CONFIG), f"data.path={data}", f"run.folder={trained.parent}", "run.name=a")
    assert message.startswith(f"{trained} already holds a run; continue it with --resume auto")
    assert (trained / "last.pt").read_bytes() == before


def test_finished_run_says_so(trained: Path, data: Path) -> None:
    shared = [
        "--config",
        str(CONFIG),
        f"data.path={data}",
        f"run.folder={trained.parent}",
        "run.name=a",
        "--resume",
        "auto",
    ]
    code, out, error = run_script([*shared, "train.max_steps=2"])
    assert code == 0, error
    assert "already finished: step 2 of 2" in out
    assert "192 training and 80 validation images, 16 classes (2 other files ignored)" in out


def test_help_lists_every_key() -> None:
    code, out, _ = run_script(["--help"])
    assert code == 0
    assert "optim.lr = 0.01  (a number)" in out and "Learning rate at reference_batch_size" in out


def test_print_config_prints_what_would_run() -> None:
    code, out, _ = run_script(["--config", "imagenet_r101_unit.yaml", "--print-config", "train.epochs=3"])
    assert code == 0
    assert "  epochs: 3\n" in out and "  name: preact_resnet101\n" in out


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_unreadable_jpeg_ends_all_ranks_with_its_name(data: Path, tmp_path: Path, loader: str) -> None:
    victim = sorted((data / "train" / "coffee").iterdir())[0]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    try:
        started = time.monotonic()
        done = train(
            torchrun(2), "--config", str(CONFIG), f"data.path={data}", f"run.folder={tmp_path}", f"data.loader={loader}"
        )
    finally:
        victim.write_bytes(whole)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("unitdist [rank ")]
    assert len(errors) == 1 and f"unreadable image {victim} (truncated JPEG: no end marker)" in errors[0]
    assert "[rank0]: Traceback" not in done.stderr and "[rank1]: Traceback" not in done.stderr
    assert time.monotonic() - started < 150, "ranks hung"
