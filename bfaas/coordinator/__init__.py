"""The coordinator's HTTP application and what it is made of."""
