"""What is not a run: webhooks, tenants, and what operators do."""

from collections.abc import Mapping, Sequence
from typing import Any

from service.client.connection import Connection, one_part
from service.client.errors import Document


class Webhooks:
    """A tenant's endpoints; with a service key and no tenant, the service's own, which hear of all its tenants."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, url: str, types: Sequence[str] = ("*",)) -> Document:
        """-> `{id, url, types, enabled, secret}`; the secret is shown this once."""
        return self._connection.ask("POST", "/v1/webhooks", json={"url": url, "types": list(types)})

    def list(self) -> Document:
        """-> `{items}`."""
        return self._connection.ask("GET", "/v1/webhooks")

    def get(self, webhook_id: str) -> Document:
        return self._connection.ask("GET", self._path(webhook_id))

    def delete(self, webhook_id: str) -> None:
        self._connection.ask("DELETE", self._path(webhook_id))

    def rotate(self, webhook_id: str) -> Document:
        """-> the new `secret`, shown this once. Both sign for 24 h."""
        return self._connection.ask("POST", self._path(webhook_id) + "/rotate")

    def deliveries(self, webhook_id: str, *, limit: int | None = None, cursor: str | None = None) -> Document:
        """The log of attempts, newest first: `{items, next_cursor}`."""
        asked = {"limit": limit, "cursor": cursor}
        params = {name: value for name, value in asked.items() if value is not None}
        return self._connection.ask("GET", self._path(webhook_id) + "/deliveries", params=params)

    def replay(self, webhook_id: str, delivery_id: str) -> Document:
        """Deliver the event of this attempt once more."""
        return self._connection.ask("POST", f"{self._path(webhook_id)}/deliveries/{one_part(delivery_id)}/replay")

    def _path(self, webhook_id: str) -> str:
        return f"/v1/webhooks/{one_part(webhook_id)}"


class Tenants:
    """With an operator's key every tenant, with a service key its own."""

    def __init__(self, connection: Connection, base: str) -> None:
        self._connection, self._base = connection, base

    def create(self, tenant: Mapping[str, Any]) -> Document:
        """-> `{tenant, key}`; the key is shown this once."""
        return self._connection.ask("POST", self._base, json=dict(tenant))

    def list(self) -> Document:
        """-> `{items}`."""
        return self._connection.ask("GET", self._base)

    def get(self, name: str) -> Document:
        return self._connection.ask("GET", self._path(name))

    def update(self, name: str, changes: Mapping[str, Any]) -> Document:
        """What is not named stays as it is."""
        return self._connection.ask("PATCH", self._path(name), repeatable=True, json=dict(changes))

    def delete(self, name: str) -> None:
        """Cancels its runs and revokes its keys."""
        self._connection.ask("DELETE", self._path(name))

    def create_key(self, name: str) -> Document:
        """-> `{id, key}`; the key is shown this once."""
        return self._connection.ask("POST", self._path(name) + "/keys")

    def revoke_key(self, name: str, key_id: str) -> None:
        self._connection.ask("DELETE", f"{self._path(name)}/keys/{one_part(key_id)}")

    def _path(self, name: str) -> str:
        return f"{self._base}/{one_part(name)}"


class Admin:
    """What needs an operator's key, but for tenants."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create_service(self, name: str) -> Document:
        """-> `{id, key}`; the key is shown this once."""
        return self._connection.ask("POST", "/v1/admin/services", json={"name": name})

    def workers(self) -> Document:
        """Those that are alive, with what each can enforce: `{items}`."""
        return self._connection.ask("GET", "/v1/admin/workers")

    def kill(self, run_id: str) -> Document:
        """Cancel any tenant's run. -> the run."""
        return self._connection.ask("POST", f"/v1/admin/runs/{one_part(run_id)}/kill", repeatable=True)

    def boundaries(self) -> Document:
        """What stands on the sites: `{items}`."""
        return self._connection.ask("GET", "/v1/admin/boundaries")

    def cleanup(
        self, scope: Mapping[str, Any] | None = None, *, plan: str | None = None, dry_run: bool = True,
        force: bool = False,
    ) -> Document:  # fmt: skip
        """A plan for `scope`, applied unless it is a dry run; or `plan`, an id, as it was shown. -> `{id, applied,
        actions}`; an action without a result is still being worked at."""
        asked: dict[str, Any] = {"dry_run": dry_run, "force": force}
        asked |= {"scope": dict(scope or {})} if plan is None else {"plan": plan}
        return self._connection.ask("POST", "/v1/admin/cleanup", json=asked)

    def get_cleanup(self, plan_id: str) -> Document:
        return self._connection.ask("GET", f"/v1/admin/cleanup/{one_part(plan_id)}")

    def drain(self, worker_id: str) -> Document:
        """It takes nothing more. -> the worker."""
        return self._connection.ask("POST", "/v1/admin/drain", repeatable=True, json={"worker": worker_id})

    def forget_site(self, site: str, *, force: bool = False) -> None:
        """What it had counts as gone."""
        params = {"force": "true"} if force else {}
        self._connection.ask("DELETE", f"/v1/admin/sites/{one_part(site)}", params=params)

    def purge(self, *, older_than_s: float, dry_run: bool = True) -> Document:
        """Give up finished runs of that age. -> how much of what."""
        asked = {"older_than_s": older_than_s, "dry_run": dry_run}
        return self._connection.ask("POST", "/v1/admin/purge", repeatable=True, json=asked)

    def audit(self, *, limit: int | None = None, cursor: str | None = None) -> Document:
        """Who did what, newest first: `{items, next_cursor}`."""
        asked = {"limit": limit, "cursor": cursor}
        params = {name: value for name, value in asked.items() if value is not None}
        return self._connection.ask("GET", "/v1/admin/audit", params=params)

    def dead_letters(self, *, limit: int | None = None, cursor: str | None = None) -> Document:
        """Deliveries that were given up: `{items, next_cursor}`."""
        asked = {"limit": limit, "cursor": cursor}
        params = {name: value for name, value in asked.items() if value is not None}
        return self._connection.ask("GET", "/v1/admin/dead-letters", params=params)

    def replay_dead_letter(self, letter_id: str) -> Document:
        """Start its deliveries again."""
        return self._connection.ask("POST", f"/v1/admin/dead-letters/{one_part(letter_id)}/replay")
