"""The one place the version is written; packaging and `sparseft --version` both read it here."""

__version__ = "0.1.0"
