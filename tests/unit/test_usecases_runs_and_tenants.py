"""Reading, cancelling and deleting runs; tenants, services and keys; what can be had now."""

from datetime import timedelta
from pathlib import Path

import pytest

from service.core.boundary import ControlPlane, Guarantees, Kernel, Nodes
from service.core.controls import PLATFORM_CEILINGS
from service.core.errors import Conflict, DocumentInvalid, NotFound, Unauthenticated
from service.core.ids import new_run_id
from service.core.placement import OFFERS
from service.core.run import Outcome, Phase
from service.core.tenancy import CeilingLimits, Ceilings, KeyKind, Principal, Tenant, Trust
from service.usecases import fetch, tenants
from service.usecases.cancel import cancel_run, delete_run
from service.usecases.capabilities import show_capabilities
from service.usecases.keys import PREFIXES, MintedKey, authenticate, key_hash, mint
from tests.factories import make_capabilities, make_tenant
from tests.unit.usecase_world import World, make_zip

FRESH = timedelta(seconds=90)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_id", ["", "run_", "run_" + "g" * 32, "run_" + "a" * 33, "../x", "run_" + "a" * 32 + "\n"])
def test_what_cannot_be_an_id_is_not_found(world: World, run_id: str) -> None:
    with pytest.raises(NotFound):
        fetch.get_run(world.store, run_id=run_id, tenant="acme")


def test_another_tenants_run_and_one_that_never_was_are_the_same_error(world: World) -> None:
    run = world.submit()
    errors = []
    for run_id in (run.id, new_run_id()):
        with pytest.raises(NotFound) as refused:
            fetch.get_run(world.store, run_id=run_id, tenant="globex")
        errors.append((refused.value.detail, refused.value.code, refused.value.extra))
    assert errors[0] == errors[1]
    assert fetch.get_run(world.store, run_id=run.id, tenant=None) == run


def test_pages_follow_each_other_by_cursor(world: World) -> None:
    ids = [world.submit().id for _ in range(5)]

    first, cursor = fetch.list_runs(world.store, tenant="acme", limit=3)
    second, end = fetch.list_runs(world.store, tenant="acme", limit=3, cursor=cursor)

    assert [run.id for run in (*first, *second)] == ids[::-1]
    assert end is None


def test_every_limit_gives_every_run_once(world: World) -> None:
    ids = [world.submit().id for _ in range(23)]
    for limit in (1, 9, 10, 11, 20, 22, 23, 24, 100):
        seen: list[str] = []
        cursor = None
        while True:
            page, cursor = fetch.list_runs(world.store, tenant="acme", limit=limit, cursor=cursor)
            assert len(page) == min(limit, 23 - len(seen))
            seen += [run.id for run in page]
            if cursor is None:
                break
        assert seen == ids[::-1]


def test_a_page_ends_early_when_its_runs_are_large(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PAGE_TEXT", 5)
    ids = []
    for text in ("1234", "56", "", "123456789", ""):
        ids.append(world.submit().id)
        world.play(text=text)
    pages, cursor = [], None
    while True:
        page, cursor = fetch.list_runs(world.store, tenant="acme", limit=100, cursor=cursor)
        pages.append([run.id for run in page])
        if cursor is None:
            break

    assert [len(page) for page in pages] == [2, 3]
    assert [run_id for page in pages for run_id in page] == ids[::-1]


def test_only_a_cursor_as_it_was_given_is_read() -> None:
    run_id = new_run_id()
    cursor = fetch.make_cursor(run_id)
    assert fetch.read_cursor(cursor) == run_id
    for bad in (cursor + "=", cursor + "A", cursor[:-1], " " + cursor, fetch.make_cursor("run_x"), run_id, "\udc80"):
        with pytest.raises(DocumentInvalid) as refused:
            fetch.read_cursor(bad)
        assert refused.value.code == "request_invalid"


def test_a_cancelled_run_says_who_did_it(world: World) -> None:
    mine, theirs = world.submit(), world.submit()

    by_tenant = cancel_run(world.store, hints=world.hints, run_id=mine.id, tenant="acme", by="tenant")
    by_operator = cancel_run(world.store, hints=world.hints, run_id=theirs.id, tenant=None, by="operator")

    assert (by_tenant.outcome, by_tenant.reason) == (Outcome.CANCELLED, "cancelled_by_tenant")
    assert by_operator.reason == "cancelled_by_operator"
    assert ("run", mine.id) in world.hints.given
    with pytest.raises(NotFound):
        cancel_run(world.store, hints=world.hints, run_id=mine.id, tenant="globex", by="tenant")


def test_a_blob_goes_with_the_last_run_that_uses_it(world: World) -> None:
    bundle = make_zip({"a": b"1"})
    first, second = world.submit(bundle=bundle), world.submit(bundle=bundle)
    assert first.bundle is not None
    with pytest.raises(Conflict) as refused:
        delete_run(world.store, bundles=world.bundles, run_id=first.id, tenant="acme")
    assert refused.value.code == "not_finished"
    for _ in range(2):
        assert world.play().phase is Phase.FINISHED

    delete_run(world.store, bundles=world.bundles, run_id=first.id, tenant="acme")
    assert world.blob_is_kept(first.bundle.digest)
    delete_run(world.store, bundles=world.bundles, run_id=second.id, tenant="acme")
    assert not world.blob_is_kept(first.bundle.digest)


# --- tenants, services, keys ------------------------------------------------------------------------------------------


def test_a_key_is_shown_once_and_kept_as_its_hash(world: World) -> None:
    minted = mint(world.store, kind=KeyKind.TENANT, tenant="acme")

    assert minted.key.startswith("bd_t_")
    assert len(minted.key) >= len("bd_t_") + 43
    assert minted.key not in repr(minted)
    assert minted.key not in repr(vars(world.store))
    assert key_hash(minted.key) in repr(world.store._keys)
    assert authenticate(world.store, key=minted.key) == Principal(key_id=minted.id, kind=KeyKind.TENANT, tenant="acme")


def test_each_kind_of_key_says_so_in_its_prefix(world: World) -> None:
    service, key = tenants.create_service(world.store, name="shop")
    operator = mint(world.store, kind=KeyKind.OPERATOR)

    assert PREFIXES == {KeyKind.TENANT: "bd_t_", KeyKind.SERVICE: "bd_s_", KeyKind.OPERATOR: "bd_a_"}
    assert authenticate(world.store, key=key.key).service_id == service.id
    assert authenticate(world.store, key=operator.key).kind is KeyKind.OPERATOR


@pytest.mark.parametrize("key", ["", "bd_t_", "bd_t_" + "a" * 43, "bd_z_" + "a" * 43, "a" * 48, "bd_t_" + "a" * 10_000])
def test_what_is_no_key_of_ours_speaks_for_nobody(world: World, key: str) -> None:
    with pytest.raises(Unauthenticated):
        authenticate(world.store, key=key)


def test_a_revoked_key_and_those_of_a_deleted_tenant_speak_for_nobody(world: World) -> None:
    def works(minted: MintedKey) -> bool:
        try:
            authenticate(world.store, key=minted.key)
        except Unauthenticated:
            return False
        return True

    first, second = (tenants.add_tenant_key(world.store, name="acme", service_id=None) for _ in range(2))
    tenants.create_tenant(world.store, tenant=make_tenant(name="globex"))
    with pytest.raises(NotFound):
        tenants.revoke_tenant_key(world.store, name="globex", key_id=first.id, service_id=None)
    tenants.revoke_tenant_key(world.store, name="acme", key_id=first.id, service_id=None)
    assert (works(first), works(second)) == (False, True)
    tenants.delete_tenant(world.store, name="acme", service_id=None)
    assert not works(second)
    with pytest.raises(Conflict):
        tenants.create_tenant(world.store, tenant=make_tenant(name="acme"))


def test_what_a_service_did_not_create_does_not_exist_for_it(world: World) -> None:
    service, _ = tenants.create_service(world.store, name="shop")
    own, _ = tenants.create_tenant(world.store, tenant=Tenant(name="corner", service_id=service.id))

    assert list(tenants.list_tenants(world.store, service_id=service.id)) == [own]
    for act in (tenants.get_tenant, tenants.delete_tenant, tenants.add_tenant_key):
        for name in ("acme", "never", "_canary", "A", "a\n", ""):
            with pytest.raises(NotFound):
                act(world.store, name=name, service_id=service.id)


def test_changes_are_merged_key_by_key_and_an_explicit_null_clears(world: World) -> None:
    limits = CeilingLimits(memory=64 * 2**20, pids=64)
    world.change_tenant(make_tenant(affinity="blue", ceilings=Ceilings(limits=limits)))
    changes = {"affinity": None, "quota": {"queued": 5}, "ceilings": {"limits": {"pids": None, "wall": "30s"}}}

    changed = tenants.change_tenant(world.store, name="acme", service_id=None, changes=changes)

    assert (changed.trust, changed.affinity) == (Trust.UNTRUSTED, None)
    assert (changed.quota.concurrent, changed.quota.queued) == (2, 5)
    assert changed.ceilings.limits == CeilingLimits(memory=64 * 2**20, wall=timedelta(seconds=30))
    with pytest.raises(DocumentInvalid):
        tenants.change_tenant(world.store, name="acme", service_id=None, changes={})


# --- capabilities -----------------------------------------------------------------------------------------------------


def test_every_offer_is_shown_with_what_is_missing_and_what_was_measured(world: World) -> None:
    weak = Guarantees(kernel=Kernel.SANDBOXED, nodes=Nodes.SHARED, control_plane=ControlPlane.SHARED)
    world.show_worker(
        make_capabilities(guarantees=weak, versions={"runtime": "1"}),
        make_capabilities(versions={"runtime": "2"}, runtimes={"default": "sha256:1", "node": "sha256:2"}),
        make_capabilities(boundary="microvm", available=False, missing=("no /dev/kvm",), runtimes={"lost": "sha256:3"}),
    )

    shown = show_capabilities(world.store, world.store, tenant="acme", worker_fresh=FRESH)

    rows = {row.boundary: row for row in shown.boundaries}
    assert list(rows) == [offer.boundary for offer in OFFERS]
    assert (rows["gvisor"].available, rows["gvisor"].missing) == (True, [])
    assert rows["gvisor"].guarantees == weak
    assert rows["gvisor"].versions == {"runtime": "1, 2"}
    assert (rows["microvm"].available, rows["microvm"].missing) == (False, ["no /dev/kvm"])
    assert rows["cluster/kind"].missing == ["no live worker offers cluster/kind"]
    assert ("lost", "sha256:3") not in shown.runtimes
    assert ("node", "sha256:2") in shown.runtimes


def test_ceilings_are_the_lower_of_the_tenants_and_the_platforms(world: World) -> None:
    own = CeilingLimits(memory=64 * 2**20, wall=timedelta(hours=2))
    world.change_tenant(make_tenant(ceilings=Ceilings(limits=own)))

    shown = show_capabilities(world.store, world.store, tenant="acme", worker_fresh=FRESH)

    assert shown.ceilings == PLATFORM_CEILINGS.model_copy(update={"memory": 64 * 2**20})
    assert shown.defaults.memory == 64 * 2**20
