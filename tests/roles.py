"""A PostgreSQL store that asks each question as a process that asks it: under that process's own login role, with the
rights that `migrate` gave it. What several processes ask is asked by each in turn."""

import itertools
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql

from service.adapters.sql.migrate import upgrade
from service.adapters.sql.roles import Role, give_rights
from service.adapters.sql_store import SqlStore
from tests.servers import PostgresServer, _conninfo

API, RELAY, WEBHOOKS, WORKER, REAPER = Role
_SAYS = {
    (API,): """submit begin_idempotent release_idempotent get_run list_runs queue_views get_kept read_news newest
        list_tenants update_tenant delete_tenant create_service list_services add_key find_key revoke_key
        revoke_minted_by ask_to_look forget_site store_plan get_plan apply_plan list_acts drain_worker playing
        add_endpoint list_endpoints get_endpoint delete_endpoint rotate_secret list_attempts replay_delivery
        dead_letters""",
    (API, RELAY): """delete_run create_tenant get_tenant live_workers canary_view expired give_up_blobs
        purge_deliveries purge_idempotency purge_events""",
    (API, REAPER): "request_cancel leases_of lease_of inventory sites begin_act end_act",
    (RELAY,): """old_canaries lead stamp unpublished mark_published retained mark_unpublished_after last_stamp
        bus_identity record_bus_identity owed record_owed stamp_again standing tenant_names unused_blobs
        deleted_tenants purge_tenant tenant_purged""",
    (WEBHOOKS,): "fan_out due_endpoints claim_deliveries settle_deliveries give_back_deliveries delivery_counts",
    (WORKER,): """claim heartbeat look append_news mark_running mark_collecting finish requeue storage_left waiting
        record_worker forget_worker is_draining""",
    (WORKER, API): "get_worker",
    (WORKER, REAPER): "record_destroyed",
    (REAPER,): """leases undestroyed recover_finish recover_requeue queues_waiting record_inventory drop_from_inventory
        note_resistance mark_quarantined is_asked_to_look orders conclude_order record_quarantined""",
    tuple(Role): "now installation_id",
}  # fmt: skip
ASKED_BY: Mapping[str, tuple[Role, ...]] = {name: roles for roles, names in _SAYS.items() for name in names.split()}


class RoledStore(SqlStore):
    """Itself the owner's; its questions are others'."""

    def __init__(self, owner: str, urls: Mapping[Role, str]) -> None:
        super().__init__(owner)
        self._turns = {name: itertools.cycle(roles) for name, roles in ASKED_BY.items()}
        self._stores = {role: SqlStore(url) for role, url in urls.items()}

    def __getattribute__(self, name: str) -> Any:
        if name not in ASKED_BY:
            return super().__getattribute__(name)
        stores, turns = super().__getattribute__("_stores"), super().__getattribute__("_turns")
        return getattr(stores[next(turns[name])], name)

    def close(self) -> None:
        for store in self._stores.values():
            store.close()
        super().close()


@contextmanager
def roled_store(server: PostgresServer) -> Iterator[RoledStore]:
    """In an empty database of its own, with roles of its own."""
    with server.fresh_database() as owner, login_roles(server) as (prefix, password):
        upgrade(owner)
        give_rights(owner, prefix)
        where = owner.partition("@")[2]
        urls = {role: f"postgresql+psycopg://{prefix}_{role}:{password}@{where}" for role in Role}
        store = RoledStore(owner, urls)
        yield store
        store.close()


@contextmanager
def login_roles(server: PostgresServer) -> Iterator[tuple[str, str]]:
    """-> the beginning of their names, and their password. They may own nothing when they go."""
    prefix, password = f"t{secrets.token_hex(6)}", secrets.token_urlsafe(16)
    with psycopg.connect(_conninfo(server.port, server.password), autocommit=True) as connection:
        for role in Role:
            name = sql.Identifier(f"{prefix}_{role}")
            connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(name, sql.Literal(password)))
    yield prefix, password
