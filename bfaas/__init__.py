"""Runs unsafe bash scripts on disposable worker machines, under strict time limits."""

__version__ = "0.2.0"
