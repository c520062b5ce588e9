"""The Machines API, emulated on one host."""
