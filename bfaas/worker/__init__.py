"""The worker's HTTP application, and the bash process that it runs."""
