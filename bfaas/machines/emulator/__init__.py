"""An emulator of Fly's Machines API and of Fly's proxy, on one host."""
