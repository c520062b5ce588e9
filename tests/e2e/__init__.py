"""Real programs on loopback, end to end."""
