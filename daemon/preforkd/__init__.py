"""Run any socketserver handler, unmodified, as a production daemon."""

__version__ = "0.1.0"
