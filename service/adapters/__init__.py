"""The ports of the core, kept by real things: SQL, Redis, Celery, files, HTTP."""
