"""Messages: numbers with their nouns, and what they tell to install."""

import ast
import re
import tomllib

import pytest

from tests.docs.blocks import PAGES, ROOT
from unitdist.wording import counted, install_extra

CODE = [file for folder in ("unitdist", "evaluation", "launch", "tools") for file in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize(
    ("number", "noun", "said"),
    [(0, ("rank",), "0 ranks"), (1, ("rank",), "1 rank"), (1281167, ("image",), "1,281,167 images")]
    + [(1, ("class", "classes"), "1 class"), (2, ("class", "classes"), "2 classes")],
)
def test_number_stands_with_its_noun(number: int, noun: tuple[str, ...], said: str) -> None:
    assert counted(number, *noun) == said


def test_what_messages_and_pages_tell_to_install_exists() -> None:
    """Extras of pyproject.toml, installed from the clone: a name before the bracket would be looked for on an index."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = set()
    for file in CODE:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == install_extra.__name__:
                asked |= {ast.literal_eval(argument) for argument in node.args}
    assert len(asked) > 3 and asked <= set(extras)
    for file in [*CODE, *PAGES]:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"pip install [^\n`]*unitdist\[", text), f"{file}: unitdist stands on no package index"
        for named in re.findall(r"pip install -c constraints\.txt -e '\.\[([\w,-]+)\]'", text):
            assert set(named.split(",")) <= set(extras), f"{file}: {named}"
