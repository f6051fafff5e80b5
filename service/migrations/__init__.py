"""The database schema, one Alembic revision at a time."""
