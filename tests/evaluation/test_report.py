import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.gallery import most_confident_errors, save_gallery
from evaluation.image_list import ImageList, list_images
from evaluation.options import ViewSettings, protocol_passes
from evaluation.pictures import save_pictures
from evaluation.report import ProtocolResult, console_table, paper_row, save_scores, summarize_protocol, write_json
from evaluation.views import Pass
from unitdist.data.index import ImageIndex
from unitdist.errors import ConfigError

PASSES = (Pass(kind="crops", scale_px=32, views=2), Pass(kind="crops", scale_px=40, views=10))


@pytest.fixture
def images(tmp_path: Path) -> ImageList:
    """60 images of 6 classes; one class name needs escaping, one image is broken."""
    names = []
    for number in range(60):
        names.append(f"image{number:02d}.png")
        Image.new("RGB", (30, 20), (number * 4, 90, 30)).save(tmp_path / names[-1])
    classes = {"<b>ant & bee</b>": 0, "bee": 1, "cat": 2, "dog": 3, "eel": 4, "fox": 5}
    listed = list_images(ImageIndex(root=tmp_path, paths=names, labels=np.arange(60) % 6, class_to_idx=classes))
    return dataclasses.replace(listed, broken={13: "cut off"})


@pytest.fixture
def result(images: ImageList) -> ProtocolResult:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 60, 6)) + 2 * np.eye(6)[images.labels_n]
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    scores[:, 13] = np.nan
    named = {plan.name: scores[place].astype(np.float32) for place, plan in enumerate(PASSES)}
    return summarize_protocol("crops", PASSES, named, images, images.broken, "softmax", (78.33, 93.22))


def test_the_summary_counts_readable_images_only(result: ProtocolResult) -> None:
    assert result.summary["count"] == 59
    assert result.summary["views"] == 12
    assert [(scale["scale_px"], scale["views"], scale["count"]) for scale in result.summary["scales"]] == [(32, 2, 59), (40, 10, 59)]
    assert sum(entry["top1_correct"] for entry in result.summary["per_class"]) == result.summary["top1_correct"]
    assert result.summary["per_class"][1] == {"class": "bee", "count": 9, "top1_correct": int(result.confusion_kk[1, 1])}
    assert result.summary["paper"] == {"top1": 78.33, "top5": 93.22}
    low, high = result.summary["top1_interval"]
    assert low < result.summary["top1"] < high


def test_the_table_shows_scales_all_views_and_the_papers_row(result: ProtocolResult) -> None:
    table = console_table([result], "preact_resnet101", "unitization")
    assert table.splitlines()[0] == "crops: preact_resnet101, unitization; 59 images, 12 views each (with mirrors), softmax averaged"
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[2:] if line.strip()}
    assert rows["32"][:2] == ["2", f"{result.summary['scales'][0]['top1']:.2f}"]
    assert rows["all"][:2] == ["12", f"{result.summary['top1']:.2f}"]
    assert rows["Table"] == ["3", "78.33", "93.22"]


def test_the_papers_row_is_only_for_the_papers_model() -> None:
    passes = protocol_passes("crops", ViewSettings())
    assert paper_row("crops", "preact_resnet101", "unitization", 1000, passes) == (78.33, 93.22)
    assert paper_row("crops", "preact_resnet101", "batchnorm", 1000, passes) == (78.12, 93.45)
    whole = protocol_passes("fully_convolutional", ViewSettings())
    assert paper_row("fully_convolutional", "preact_resnet101", "unitization", 1000, whole) == (77.84, 93.33)
    assert paper_row("crops", "preact_resnet101", "unitization", 16, passes) is None
    assert paper_row("crops", "preact_resnet50", "unitization", 1000, passes) is None
    assert paper_row("crops", "preact_resnet101", "unitization", 1000, passes[:3]) is None
    assert paper_row("single", "preact_resnet101", "unitization", 1000, passes) is None


def test_the_most_confident_errors_come_first(result: ProtocolResult) -> None:
    places = most_confident_errors(result, 100)
    predictions = result.probabilities_mk.argmax(1)
    assert set(places) == set(np.flatnonzero(predictions != result.labels_m))
    confidences = result.probabilities_mk.max(1)[places]
    assert list(confidences) == sorted(confidences, reverse=True)
    assert most_confident_errors(result, 2) == places[:2]


class Tags(HTMLParser):
    """Counts tags and keeps the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_gallery_is_one_file_with_its_thumbnails_and_escapes_names(result: ProtocolResult, images: ImageList, tmp_path: Path) -> None:
    save_gallery(tmp_path / "errors.html", result, images, 8)
    page = (tmp_path / "errors.html").read_text()
    parsed = Tags()
    parsed.feed(page)
    thumbnails = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert len(thumbnails) == min(8, result.summary["count"] - result.summary["top1_correct"])
    assert all(str(attributes["src"]).startswith("data:image/jpeg;base64,") for attributes in thumbnails)
    assert "<b>ant" not in page
    assert not re.search(r"(src|href)=.(https?:)?//", page)


def test_a_gallery_without_errors_says_so(images: ImageList, tmp_path: Path) -> None:
    perfect = {plan.name: np.eye(6, dtype=np.float32)[images.labels_n] for plan in PASSES}
    save_gallery(tmp_path / "errors.html", summarize_protocol("crops", PASSES, perfect, images, images.broken, "softmax"), images, 8)
    assert "No errors." in (tmp_path / "errors.html").read_text()


def test_pictures_are_written_with_content(result: ProtocolResult, tmp_path: Path) -> None:
    paths = save_pictures(tmp_path, result)
    assert [path.name for path in paths] == ["crops_per_class.png", "crops_confusion.png", "crops_calibration.png"]
    for path in paths:
        with Image.open(path) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20


def test_a_thousand_classes_fit_into_the_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names, labels = [f"{number}.jpg" for number in range(2000)], np.arange(2000) % 1000
    classes = {f"n{number:08d}": number for number in range(1000)}
    many = ImageList(
        source=ImageIndex(root=tmp_path, paths=names, labels=labels, class_to_idx=classes),
        root=tmp_path,
        names=tuple(names),
        labels_n=labels,
        shapes=((1, 1),) * 2000,
        class_to_idx=classes,
        broken={},
    )
    scores = {plan.name: rng.random((2000, 1000), dtype=np.float32) for plan in PASSES}
    for path in save_pictures(tmp_path, summarize_protocol("crops", PASSES, scores, many, {}, "softmax")):
        with Image.open(path) as picture:
            assert max(picture.size) < 2500


def test_saved_scores_can_be_read_without_pickle(result: ProtocolResult, images: ImageList, tmp_path: Path) -> None:
    save_scores(tmp_path / "scores.npz", result, images)
    with np.load(tmp_path / "scores.npz", allow_pickle=False) as saved:
        assert saved["probabilities"].shape == (59, 6)
        assert saved["probabilities"].dtype == np.float32
        assert saved["names"].tolist() == [name for place, name in enumerate(images.names) if place != 13]
        assert saved["labels"].tolist() == result.labels_m.tolist()
        assert saved["classes"].tolist()[1] == "bee"


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", {"top1": 0.5, "name": "Käfer"})
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == {"top1": 0.5, "name": "Käfer"}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(ConfigError, match="--output: cannot write"):
        write_json(tmp_path / "nowhere" / "report.json", {})
