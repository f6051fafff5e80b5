"""The API, the worker, Redis and the database as real processes."""
