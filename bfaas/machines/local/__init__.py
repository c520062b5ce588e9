"""Machines as processes of this host."""
