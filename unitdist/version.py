"""The package's version: pyproject.toml reads it here, and so does a checkout that is not installed."""

__version__ = "0.1.0"
