"""The run protocol: requests, responses and their formats, for both ends."""
