"""What the sections' checks share."""

from unitdist.errors import ConfigError


def require(condition: bool, key: str, requirement: str, value: object) -> None:
    """Raises ConfigError that names `key` (dotted), what it must be and what it is."""
    if not condition:
        raise ConfigError(f"{key}: must be {requirement}, got {value!r}")
