"""Bring a database to this version's schema."""

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from service.adapters.sql.engine import Database
from service.adapters.sql.schema import metadata

_UPGRADES = 0x6D696772  # a number that nobody else locks in this database


def upgrade(url: str) -> None:
    """Make the tables, or change them to what this version needs; all of it or nothing. Raises Unavailable.

    Several processes may start at once: the first to come does it, the others wait and find it done. Where it is done
    already, nothing but one SELECT is asked of the database: whoever calls need not own the tables.
    """
    config = Config()
    config.set_main_option("script_location", "service:migrations")
    config.set_main_option("path_separator", "os")
    db = Database(url)
    try:
        with db.read() as connection:
            heads = MigrationContext.configure(connection).get_current_heads()
            if set(heads) == set(ScriptDirectory.from_config(config).get_heads()):
                return
        with db.write() as connection:  # SQLite: BEGIN IMMEDIATE, one at a time
            if not db.is_sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_UPGRADES)))
            config.attributes["connection"] = connection
            config.attributes["metadata"] = metadata
            command.upgrade(config, "head")
    finally:
        db.close()
