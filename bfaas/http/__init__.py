"""HTTP server and client with limits; independent of runs and machines."""
