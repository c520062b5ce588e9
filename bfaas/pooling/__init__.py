"""The parts of the pool: slots, the queue, machine lifecycles, reconciliation."""
