"""The version of taskvec."""

__version__ = "0.1.0"
