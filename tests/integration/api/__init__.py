"""The HTTP API as it is served, on real databases and a real Redis."""
