"""Machines: what the pool asks of them, and who provides them."""
