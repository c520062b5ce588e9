"""Runs unsafe bash scripts on disposable worker machines, under strict time limits."""
