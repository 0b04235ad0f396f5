"""Words that messages share."""


def counted(number: int, word: str, words: str = "") -> str:
    """A number with its noun: 1 rank, 2 ranks, 1,281,167 images; `words` is the plural where an s does not make it."""
    return f"{number:,} {word if number == 1 else words or word + 's'}"


def install_extra(extra: str, instead: str | None = None) -> str:
    """How an extra of pyproject.toml is had: unitdist stands on no package index, it is installed from its clone."""
    other = f" (or {instead})" if instead else ""
    return f"pip install -c constraints.txt -e '.[{extra}]'{other} in the clone of unitdist"
