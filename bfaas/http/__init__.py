"""HTTP with limits, both ends; it knows nothing of runs or machines."""
