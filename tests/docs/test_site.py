"""The documentation site: built strictly, complete, readable without a network."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.blocks import ROOT
from unitdist.config import Config


class Links(HTMLParser):
    """What a page refers to, and what it loads: scripts, styles, pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.refers: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.anchors.add(str(given["id"]))
        if tag == "a" and given.get("href"):
            self.refers.append(str(given["href"]))
        if tag in ("script", "img") and given.get("src"):
            self.loads.append(str(given["src"]))
        if tag == "link" and given.get("href") and given.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(str(given["href"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {file: parsed(file) for file in sorted(site.rglob("*.html"))}


def parsed(file: Path) -> Links:
    links = Links()
    links.feed(file.read_text(encoding="utf-8"))
    return links


def test_site_builds_without_a_warning_and_reads_offline(site: Path, pages: dict[Path, Links]) -> None:
    assert len(pages) >= 25
    for file, links in pages.items():
        assert links.loads
        for target in links.loads:
            assert not urlsplit(target).netloc, f"{file.name} loads {target}"
    styles = "".join(sheet.read_text(encoding="utf-8") for sheet in site.rglob("*.css"))
    assert not re.search(r"url\(['\"]?(?:https?:)?//", styles)


def test_no_link_and_no_anchor_is_dead(site: Path, pages: dict[Path, Links]) -> None:
    checked = 0
    for file, links in pages.items():
        if file.name == "404.html":
            continue
        for target in {*links.refers, *links.loads}:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            reached = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            reached = reached / "index.html" if reached.is_dir() else reached
            assert reached.is_file(), f"{file.relative_to(site)} links to {target}"
            if parts.fragment and not parts.fragment.startswith("__") and reached.suffix == ".html":
                assert unquote(parts.fragment) in pages[reached].anchors, f"{file.relative_to(site)} links to {target}"
            checked += 1
    assert checked > 500


def test_readme_and_contributing_link_to_files() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page} links to {target}"


def keys() -> Iterator[str]:
    for section in fields(Config):
        for key in fields(section.type):  # type: ignore[arg-type]
            yield f"{section.name}.{key.name}"


def test_every_key_stands_in_the_reference(site: Path) -> None:
    text = (site / "reference" / "configuration.html").read_text(encoding="utf-8")
    assert [key for key in keys() if f"<code>{key}</code>" not in text] == []


def test_every_key_in_the_pages_exists() -> None:
    """`section.key` in backticks is a key of the configuration."""
    sections = "|".join(section.name for section in fields(Config))
    known = set(keys())
    unknown = []
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for key in re.findall(rf"`((?:{sections})\.[a-z][a-z0-9_]*)(?:=|:|`)", page.read_text(encoding="utf-8")):
            if key not in known and not key.endswith((".py", ".md", ".yaml", ".json", ".onnx", ".safetensors")):
                unknown.append(f"{page.name}: {key}")
    assert unknown == []


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("layers", "Unitization2d"), ("functional", "unitization_images"), ("sync", "merge_moments"), ("models", "load_pretrained"),
        ("models", "export_onnx"), ("analysis", "estimate_em_distances"), ("evaluation", "EvaluationOptions"),
    ],
)  # fmt: skip
def test_interface_stands_in_the_reference(pages: dict[Path, Links], site: Path, page: str, name: str) -> None:
    anchors = pages[site / "reference" / f"{page}.html"].anchors
    assert any(anchor.endswith(f".{name}") for anchor in anchors)
