"""A run on the wire: requests, responses and their formats, as both ends see them."""
