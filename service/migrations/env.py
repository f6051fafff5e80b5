"""Alembic's entry. It sees no settings: the caller hands it a connection, inside the transaction that holds it all."""

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=context.config.attributes["metadata"])
with context.begin_transaction():
    context.run_migrations()
