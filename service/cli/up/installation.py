"""The database of one `up`: its schema, its first tenant, this start's keys, and the runs that must end with it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from service.adapters.sql_store import SqlStore
from service.core.errors import Conflict, NotFound
from service.core.run import ACTIVE
from service.core.tenancy import KeyKind, Tenant, Trust
from service.settings import Settings
from service.usecases.keys import mint

TENANT, SERVICE, MINTED_BY = "demo", "up", "up"


@dataclass(frozen=True)
class Keys:
    """This start's keys; those of the last one are revoked. They exist here, in the client file and as hashes."""

    tenant: str
    tenant_key: str = field(repr=False)
    service_key: str = field(repr=False)
    admin_key: str = field(repr=False)


@contextmanager
def _store(settings: Settings) -> Iterator[SqlStore]:
    """Open for a moment only: `up` starts processes, and a connection must not be carried into one."""
    store = SqlStore(settings.sql_url)
    try:
        yield store
    finally:
        store.close()


def prepare(settings: Settings) -> None:
    """Bring the schema to this version's. Raises Unavailable, StorageFull."""
    with _store(settings) as store:
        store.migrate()


def mint_keys(settings: Settings) -> Keys:
    """Revoke the keys of the last start and make new ones; a fresh database gets its tenant and its service."""
    with _store(settings) as store:
        tenant, service_id = _first_tenant(store), _own_service(store)
        store.revoke_minted_by(MINTED_BY)
        return Keys(
            tenant=tenant,
            tenant_key=mint(store, kind=KeyKind.TENANT, tenant=tenant, minted_by=MINTED_BY).key,
            service_key=mint(store, kind=KeyKind.SERVICE, service_id=service_id, minted_by=MINTED_BY).key,
            admin_key=mint(store, kind=KeyKind.OPERATOR, minted_by=MINTED_BY).key,
        )


def _first_tenant(store: SqlStore) -> str:
    """`demo`; where an operator has deleted it, its name stays taken and the next one is `demo-2`."""
    number = 1
    while True:
        name = TENANT if number == 1 else f"{TENANT}-{number}"
        try:
            return store.get_tenant(name).name
        except NotFound:
            number += 1
        try:
            return store.create_tenant(Tenant(name=name, trust=Trust.UNTRUSTED)).name
        except Conflict:
            continue


def _own_service(store: SqlStore) -> str:
    known = (service.id for service in store.list_services() if service.name == SERVICE)
    return next(known, None) or store.create_service(SERVICE).id


def remove_runtime_directory(settings: Settings) -> None:
    """This installation's place for live boundaries, when none is left in it."""
    with _store(settings) as store:
        home = settings.runtime_dir / store.installation_id()
    with suppress(OSError):  # absent, or something resists in it, and the next start's reaper goes on
        home.rmdir()


def cancel_what_runs(settings: Settings) -> Iterator[str]:
    """Ask for the end of every run that a worker holds; -> their ids. What waits in the queue stays there."""
    with _store(settings) as store:
        for phase in sorted(ACTIVE):
            for run in store.list_runs(None, phase=phase, outcome=None, limit=100, before=None).items:
                store.request_cancel(run.id, None, by="operator")
                yield run.id
