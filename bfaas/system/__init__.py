"""The operating system: processes, confinement, signals, logs."""
