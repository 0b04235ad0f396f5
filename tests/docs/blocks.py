"""The code blocks of README, CONTRIBUTING and docs/, and what stands before them.

A block of shell commands or Python runs in the tests as it stands, unless the line before it says
`<!-- needs: WHAT -->` (cannot run here), `<!-- tested: TEST_NAME -->` (a test of its own covers it), or `<!-- slow -->`.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>needs|tested|slow)(?:: (?P<what>.*?))? -->\n)?```(?P<language>.*)\n(?P<text>(?:.*\n)*?)```$",
    re.MULTILINE,
)
LANGUAGES = {"sh", "python", "text", "yaml", "toml", "json"}
INDENTED_COMMAND = re.compile(r"^    (?:python|torchrun|sh|make|pip|[A-Z_]+=\S+ python) .*$", re.MULTILINE)
INLINE_COMMAND = re.compile(r"`((?:[A-Z_]+=\S+\s+)*(?:python|torchrun|sh)\s[^`]+)`")
OVERRIDE = re.compile(r"[a-z_]+\.[a-z_0-9]+=.*")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block. page: path in the repository. line: of its fence, counted from 1."""

    page: str
    line: int
    language: str
    mark: str | None
    what: str | None
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        return commands_of(self.text)


def commands_of(text: str) -> list[list[str]]:
    """The words of each shell command; comments, and assignments before a command, are left out."""
    joined = re.sub(r"(?<!\S)#.*$", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    parts = [part for line in joined.splitlines() for part in re.split(r"&&|;", line)]
    split = [shlex.split(part) for part in parts]
    return [words[_assignments(words) :] for words in split if words[_assignments(words) :]]


def inline_commands() -> list[tuple[str, str]]:
    """(page, command) of every command that stands in a sentence."""
    found = []
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        name = str(page.relative_to(ROOT))
        found += [(name, " ".join(command.split())) for command in INLINE_COMMAND.findall(prose)]
    return found


def _assignments(words: list[str]) -> int:
    count = 0
    while count < len(words) and re.match(r"[A-Z_]+=", words[count]):
        count += 1
    return count


def blocks() -> list[Block]:
    """Every fenced block of every page."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            found.append(
                Block(
                    page=str(page.relative_to(ROOT)),
                    line=text.count("\n", 0, match.start("language")) + 1,
                    language=match["language"].strip(),
                    mark=match["mark"],
                    what=match["what"],
                    text=match["text"],
                )
            )
    return found
