"""PostgreSQL with a login role for each process: what each can, and what it is refused. That each can do all of its
work is what tests/contract shows: there every question is asked under the role of the process that asks it."""

import secrets
from collections.abc import Iterator

import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege

from service.adapters.sql.migrate import upgrade
from service.adapters.sql.roles import RIGHTS, Role, give_rights, rights_of
from service.core.errors import BlastdoorError
from tests.deployment import make_roles, make_secrets
from tests.roles import RoledStore, login_roles, roled_store
from tests.servers import PostgresServer


@pytest.fixture(scope="module")
def store(postgres_server: PostgresServer) -> Iterator[RoledStore]:
    with roled_store(postgres_server) as made:
        yield made


def connect(store: RoledStore, role: Role | None) -> "psycopg.Connection[tuple[object, ...]]":
    """As that role, or as the owner."""
    url = (store if role is None else store._stores[role])._db.url
    return psycopg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False), autocommit=True)


def is_refused(connection: "psycopg.Connection[tuple[object, ...]]", statement: str) -> bool:
    """Whether it is for want of a right. What it does is undone; that it is wrong otherwise does not count."""
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(statement)
    except InsufficientPrivilege:
        return True
    except (psycopg.IntegrityError, psycopg.NotSupportedError):
        return False
    return False


def columns_of(connection: "psycopg.Connection[tuple[object, ...]]", table: str) -> list[str]:
    asked = "SELECT column_name FROM information_schema.columns WHERE table_name = %s AND table_schema = 'public'"
    return [str(name) for (name,) in connection.execute(asked, [table])]


@pytest.mark.parametrize("role", list(Role))
def test_a_role_may_do_what_its_row_says_and_nothing_else(store: RoledStore, role: Role) -> None:
    with connect(store, None) as owner, connect(store, role) as connection:
        for table in RIGHTS:
            rights = rights_of(role, table)
            for name in columns_of(owner, table):
                asked = {
                    "SELECT": f'SELECT "{name}" FROM {table} WHERE false',
                    "UPDATE": f'UPDATE {table} SET "{name}" = NULL WHERE false',
                }
                for privilege, statement in asked.items():
                    columns = rights.get(privilege)
                    may = columns is not None and (not columns or name in columns)
                    assert is_refused(connection, statement) is not may, statement
                    assert not is_refused(owner, statement), statement
            for privilege, statement in {
                "INSERT": f"INSERT INTO {table} DEFAULT VALUES", "DELETE": f"DELETE FROM {table} WHERE false",
            }.items():  # fmt: skip
                assert is_refused(connection, statement) is (privilege not in rights), statement
                assert not is_refused(owner, statement), statement


FORBIDDEN = [
    (Role.WORKER, "SELECT hash FROM api_key"),
    (Role.WORKER, "SELECT secret FROM webhook_endpoint"),
    (Role.WORKER, "SELECT * FROM audit"),
    (Role.WORKER, "UPDATE run SET tenant = 'other' WHERE false"),
    (Role.WORKER, "UPDATE tenant SET concurrent = 99 WHERE false"),
    (Role.WORKER, "DELETE FROM run"),
    (Role.WORKER, "UPDATE outbox SET published = true WHERE false"),
    (Role.REAPER, "SELECT hash FROM api_key"),
    (Role.REAPER, "SELECT secret FROM webhook_endpoint"),
    (Role.REAPER, "SELECT detail FROM audit"),
    (Role.REAPER, "DELETE FROM audit"),
    (Role.REAPER, "SELECT scenario FROM run_input"),
    (Role.REAPER, "INSERT INTO cleanup_action DEFAULT VALUES"),
    (Role.RELAY, "SELECT secret FROM webhook_endpoint"),
    (Role.RELAY, "SELECT hash FROM api_key"),
    (Role.RELAY, "UPDATE run SET outcome = 'passed' WHERE false"),
    (Role.WEBHOOKS, "SELECT * FROM run"),
    (Role.WEBHOOKS, "SELECT hash FROM api_key"),
    (Role.WEBHOOKS, "UPDATE webhook_endpoint SET url = 'https://x' WHERE false"),
    (Role.API, "DELETE FROM audit"),
    (Role.API, "UPDATE audit SET who = 'nobody' WHERE false"),
    (Role.API, "UPDATE api_key SET hash = 'x' WHERE false"),
    (Role.API, "DELETE FROM api_key"),
]
FOR_NOBODY = [
    "CREATE TABLE mine (a int)", "CREATE TEMPORARY TABLE mine (a int)", "DROP TABLE run CASCADE", "TRUNCATE outbox",
    "ALTER TABLE run ADD COLUMN a int", "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE ROLE other SUPERUSER", "SELECT pg_read_file('/etc/passwd')", "COPY audit TO PROGRAM 'true'",
    "UPDATE alembic_version SET version_num = '0' WHERE false", "SELECT setval('outbox_id_seq', 1)",
    "CREATE SCHEMA mine",
]  # fmt: skip


@pytest.mark.parametrize(
    ("role", "statement"), FORBIDDEN + [(role, statement) for statement in FOR_NOBODY for role in Role]
)
def test_what_a_role_must_not_do_is_refused_to_it_and_not_to_the_owner(
    store: RoledStore, role: Role, statement: str
) -> None:
    with connect(store, role) as connection, connect(store, None) as owner:
        assert is_refused(connection, statement)
        assert not is_refused(owner, statement), "the control: it would work"


def test_giving_rights_again_takes_away_what_somebody_added(
    postgres_database: str, postgres_server: PostgresServer
) -> None:
    upgrade(postgres_database)
    with login_roles(postgres_server) as (prefix, password):
        give_rights(postgres_database, prefix)
        libpq = postgres_database.replace("+psycopg", "")
        as_worker = f"postgresql://{prefix}_worker:{password}@{libpq.partition('@')[2]}"
        with psycopg.connect(libpq, autocommit=True) as owner, psycopg.connect(as_worker, autocommit=True) as worker:
            owner.execute(f"GRANT SELECT ON audit TO {prefix}_worker")
            owner.execute(f"GRANT SELECT (secret) ON webhook_endpoint TO {prefix}_worker")
            for statement in ("SELECT * FROM audit", "SELECT secret FROM webhook_endpoint"):
                assert not is_refused(worker, statement), "the control: it could, once somebody had let it"
            give_rights(postgres_database, prefix)

            for statement in ("SELECT * FROM audit", "SELECT secret FROM webhook_endpoint"):
                assert is_refused(worker, statement)
            assert not is_refused(worker, "SELECT id FROM run")


def test_who_does_not_own_the_tables_finds_them_current_and_touches_nothing(store: RoledStore) -> None:
    url = store._stores[Role.API]._db.url.render_as_string(hide_password=False)
    upgrade(url)

    with connect(store, None) as owner:
        owner.execute("UPDATE alembic_version SET version_num = 'older'")
        try:
            with pytest.raises(Exception, match=r"older|migrate"):
                upgrade(url)
        finally:
            owner.execute("UPDATE alembic_version SET version_num = '0001'")


def test_an_empty_database_is_not_for_the_api_to_fill(postgres_server: PostgresServer, postgres_database: str) -> None:
    with login_roles(postgres_server) as (prefix, password):
        where = postgres_database.partition("@")[2]
        with pytest.raises(BlastdoorError, match=r"service\.main migrate"):
            upgrade(f"postgresql+psycopg://{prefix}_api:{password}@{where}")


def test_roles_that_are_missing_and_databases_without_roles_are_errors(
    postgres_database: str, sqlite_database: str
) -> None:
    upgrade(postgres_database)
    absent = f"absent{secrets.token_hex(4)}"
    with pytest.raises(BlastdoorError, match=f"{absent}_api.*postgres-roles.sh"):
        give_rights(postgres_database, absent)
    with pytest.raises(BlastdoorError, match="SQLite"):
        give_rights(sqlite_database, "blastdoor")


def test_the_script_makes_roles_that_can_do_nothing_yet_and_may_be_run_again(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    variables = make_secrets(tmp_path_factory.mktemp("secrets"))
    prefix = f"t{secrets.token_hex(4)}"
    make_roles(postgres_server, variables, prefix=prefix)
    make_roles(postgres_server, variables, prefix=prefix)
    own = {"host": "127.0.0.1", "port": postgres_server.port, "user": "postgres", "password": postgres_server.password}
    with psycopg.connect(**own, dbname="postgres", autocommit=True) as server:  # type: ignore[arg-type]
        try:
            made = server.execute(
                "SELECT rolname, rolsuper, rolcreatedb, rolcreaterole, rolbypassrls, rolcanlogin FROM pg_roles "
                "WHERE rolname LIKE %s ORDER BY 1", [f"{prefix}\\_%"],
            ).fetchall()  # fmt: skip
            assert made == [(f"{prefix}_{name}", False, False, False, False, True) for name in sorted([*Role, "owner"])]
            login = own | {"user": f"{prefix}_worker", "dbname": prefix, "password": "wrong"}
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(**login)  # type: ignore[arg-type]
            psycopg.connect(**login | {"password": variables["POSTGRES_WORKER_PASSWORD"]}).close()  # type: ignore[arg-type]
        finally:
            server.execute(f'DROP DATABASE "{prefix}" WITH (FORCE)')
