"""MkDocs hooks: pages made from the code, and marks before code blocks that readers of the site see too.

MkDocs calls `on_files` and `on_page_markdown` (mkdocs.yml, `hooks`). `python tools/docs_site.py` prints the configuration
reference.
"""

import dataclasses
import re
import sys
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from unitdist.config import Config  # noqa: E402
from unitdist.config_file import field_meanings, plain_default, type_name  # noqa: E402

COPIED = {
    "project/contributing.md": "CONTRIBUTING.md",
    "project/changelog.md": "CHANGELOG.md",
    "project/decisions.md": "DECISIONS.md",
}
"""Page of the site -> file of the repository whose text it shows."""

MARK = re.compile(r"^<!-- (needs|tested|slow)(?:: (.*?))? -->$", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Adds the configuration reference and the project's own files as pages."""
    from mkdocs.structure.files import File

    pages = {"reference/configuration.md": configuration_reference()}
    pages |= {page: (ROOT / source).read_text(encoding="utf-8") for page, source in COPIED.items()}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns the mark before a code block (tests/docs/blocks.py) into a line of text."""
    return MARK.sub(shown_mark, markdown)


def shown_mark(mark: re.Match[str]) -> str:
    kind, what = mark.groups()
    text = {
        "needs": f"Needs {what}: not run by the tests.",
        "tested": "Run by a test of its own.",
        "slow": "Run by the slow tests.",
    }[kind]
    return f'<p class="needs">{text}</p>\n'


def configuration_reference() -> str:
    """Markdown: every section and key of a configuration, in the order of the dataclasses."""
    lines = [
        "# Configuration reference",
        "",
        "Made from `unitdist/config/`. A YAML file holds sections, a section holds keys; what a file leaves out has its default.",
        "On the command line `section.key=value` replaces a key. An unknown key, a duplicate, another type or a value out of range is",
        "an error that names file, line and the nearest key. `base: OTHER.yaml` builds on another file. `python launch/train.py --help`",
        "prints this page, `--print-config` the resolved configuration of a run.",
        "",
    ]
    for section in dataclasses.fields(Config):
        kind = typing.cast(type, section.type)
        meanings = field_meanings(kind)
        lines += [
            f"## {section.name}",
            "",
            str(kind.__doc__),
            "",
            "| key | type | default | meaning |",
            "| --- | --- | --- | --- |",
        ]
        for key in dataclasses.fields(kind):
            cells = (f"`{section.name}.{key.name}`", type_name(key.type), f"`{plain_default(key)}`", meanings[key.name])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(configuration_reference())
