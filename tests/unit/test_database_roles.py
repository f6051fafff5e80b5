"""The table of rights: whole, and the same in the documentation."""

import re
from pathlib import Path

import pytest

from service.adapters.sql.roles import ALEMBIC, RIGHTS, Role, rights_of
from service.adapters.sql.schema import metadata
from service.adapters.sql_store import SqlStore
from tests.roles import ASKED_BY

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
WORDS = {"SELECT": "read", "INSERT": "add", "UPDATE": "change", "DELETE": "delete"}
SECRETS = [("api_key", "hash"), ("webhook_endpoint", "secret"), ("webhook_endpoint", "old_secret"),
           ("webhook_endpoint", "url"), ("audit", "who"), ("audit", "detail"), ("idempotency", "answer")]  # fmt: skip


def test_every_table_says_what_every_role_may_do() -> None:
    assert set(RIGHTS) == set(metadata.tables) | {ALEMBIC}
    for table, row in RIGHTS.items():
        assert set(row) == set(Role), table


@pytest.mark.parametrize("table", sorted(RIGHTS))
def test_a_right_is_about_columns_that_exist(table: str) -> None:
    for role in Role:
        text = RIGHTS[table][role]
        for privilege, columns in rights_of(role, table).items():
            assert privilege in WORDS
            assert not columns or set(columns) <= set(metadata.tables[table].c.keys()), (role, privilege)
        spelled = ", ".join(f"{p} ({', '.join(c)})" if c else p for p, c in rights_of(role, table).items())
        assert spelled == text, "nothing of a right is overlooked when it is read"


@pytest.mark.parametrize(("table", "column"), SECRETS)
@pytest.mark.parametrize("role", [Role.WORKER, Role.REAPER, Role.RELAY])
def test_keys_secrets_and_the_audit_are_read_by_nobody_who_builds_boundaries(
    role: Role, table: str, column: str
) -> None:
    columns = rights_of(role, table).get("SELECT", ("",))

    assert columns
    assert column not in columns


def test_each_question_of_the_store_has_a_process_that_asks_it() -> None:
    """Or the contract tests would ask it as the tables' owner."""
    questions = {name for name in dir(SqlStore) if not name.startswith("_")} - {"migrate", "close"}

    assert questions == set(ASKED_BY)


def test_the_documentation_has_the_same_table() -> None:
    chapter = OPERATIONS.read_text().partition("### Roles in PostgreSQL")[2].partition("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", chapter, re.MULTILINE)
    documented = {table: [cell.strip() for cell in cells.split("|")] for table, cells in rows}

    assert documented == {table: [_short(role, table) for role in Role] for table in RIGHTS}


def _short(role: Role, table: str) -> str:
    """`read`, or `(read)` where it is about some columns only."""
    said = rights_of(role, table)
    return " ".join(f"({word})" if said[name] else word for name, word in WORDS.items() if name in said)
