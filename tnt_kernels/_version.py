"""The version, written once: pyproject.toml reads this file, and ``_C`` is built with it."""

__version__ = "0.1.0"
