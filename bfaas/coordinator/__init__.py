"""The coordinator: its HTTP application, client of the workers, run log, metrics and web page."""
