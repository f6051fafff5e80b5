"""Choosing the wall: the table of the design, the rules, and that isolation never degrades whatever is asked."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.boundary import Capabilities, ControlPlane, Guarantees, Kernel, Nodes
from service.core.controls import Controls, Isolation, Need, apply
from service.core.errors import PlacementRefused
from service.core.placement import OFFERS, Placement, Policy, choose, queues, require, strength, version_at_least
from service.core.tenancy import Tenant, Trust
from tests.factories import make_capabilities, make_controls, make_tenant

TABLE = """
namespace/runc        10 shared    shared    shared
gvisor                30 sandboxed shared    isolated
namespace/gvisor      40 sandboxed shared    shared
microvm               50 dedicated shared    isolated
namespace/kata-qemu   60 dedicated shared    shared
namespace/kata-fc     60 dedicated shared    shared
cluster/kind          70 sandboxed shared    dedicated
cluster/capi          80 dedicated dedicated dedicated
"""
BOUNDARIES = tuple(offer.boundary for offer in OFFERS)
TRUSTED = make_tenant(name="partner", trust=Trust.TRUSTED)
UNTRUSTED = make_tenant()


def offered(*boundaries: str, **more: Any) -> list[Capabilities]:
    able = {"abilities": frozenset({"kubernetes-api", "privileged"})} | more
    return [make_capabilities(boundary=boundary, **able) for boundary in boundaries or BOUNDARIES]


def place(tenant: Tenant, *boundaries: str, policy: Policy | None = None, **asked: Any) -> Placement:
    """Where the tenant's run goes when these boundaries (all, when none is named) can be built."""
    return choose(tenant, make_controls(tenant=tenant, **asked), policy or Policy(), offered(*boundaries))


def refused(tenant: Tenant, *boundaries: str, **asked: Any) -> PlacementRefused:
    with pytest.raises(PlacementRefused) as refusal:
        place(tenant, *boundaries, **asked)
    return refusal.value


def test_the_offers_are_the_table_of_the_design() -> None:
    rows = [
        f"{o.boundary} {o.rank} {o.guarantees.kernel} {o.guarantees.nodes} {o.guarantees.control_plane}" for o in OFFERS
    ]

    assert rows == [" ".join(line.split()) for line in TABLE.strip().splitlines()]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_each_boundary_is_chosen_where_it_is_the_only_one_that_can_be_built(boundary: str) -> None:
    placement = place(TRUSTED, boundary)

    assert placement.boundary == boundary
    assert placement.guarantees == next(offer.guarantees for offer in OFFERS if offer.boundary == boundary)
    assert f"{placement.kind}/{placement.variant}".rstrip("/") == boundary


@pytest.mark.parametrize(
    ("tenant", "asked", "boundary"),
    [
        (TRUSTED, {}, "namespace/runc"),
        (TRUSTED, {"isolation": "soft"}, "namespace/runc"),
        (TRUSTED, {"code": "trusted"}, "namespace/runc"),
        (TRUSTED, {"code": "untrusted"}, "gvisor"),
        (TRUSTED, {"isolation": "hard"}, "gvisor"),
        (TRUSTED, {"isolation": "dedicated-cluster"}, "cluster/kind"),
        (TRUSTED, {"needs": ["kubernetes-api"]}, "cluster/kind"),
        (TRUSTED, {"needs": ["privileged"]}, "microvm"),
        (TRUSTED, {"needs": ["privileged", "kubernetes-api"]}, "cluster/capi"),
        (UNTRUSTED, {}, "gvisor"),
        (UNTRUSTED, {"isolation": "soft"}, "gvisor"),
        (UNTRUSTED, {"isolation": "hard"}, "gvisor"),
        (UNTRUSTED, {"isolation": "dedicated-cluster"}, "cluster/kind"),
        (UNTRUSTED, {"needs": ["privileged"]}, "microvm"),
        (make_tenant(affinity="gpu"), {}, "cluster/capi"),
        (make_tenant(trust=Trust.TRUSTED, affinity="gpu"), {}, "cluster/capi"),
    ],
    ids=str,
)
def test_the_lowest_rank_that_covers_what_is_required_wins(
    tenant: Tenant, asked: dict[str, Any], boundary: str
) -> None:
    assert place(tenant, **asked).boundary == boundary


@pytest.mark.parametrize(
    ("trust", "boundary"), [(Trust.TRUSTED, "namespace/runc+affinity"), (Trust.UNTRUSTED, "namespace/gvisor+affinity")]
)
def test_a_tenant_with_affinity_goes_to_its_own_node_group_where_there_is_one(trust: Trust, boundary: str) -> None:
    tenant = make_tenant(trust=trust, affinity="gpu")
    controls = make_controls(tenant=tenant)
    placement = choose(tenant, controls, Policy(), offered(node_groups=frozenset({"gpu"})))

    assert placement.boundary == boundary
    assert placement.guarantees.nodes is Nodes.DEDICATED
    assert (placement.node_group, placement.queue) == ("gpu", f"{boundary}/gpu")
    assert placement.queue in queues(offered(node_groups=frozenset({"gpu"})))
    assert placement.queue not in queues(offered(node_groups=frozenset({"other"})))
    with pytest.raises(PlacementRefused) as refusal:
        choose(tenant, controls, Policy(), offered(boundary.split("+")[0], node_groups=frozenset({"other"})))
    assert "no live worker has a node in group gpu that is kept for it" in str(refusal.value.extra["candidates"])


@pytest.mark.parametrize(("need", "boundary"), [("privileged", "cluster/capi"), ("kubernetes-api", "cluster/kind")])
def test_a_guarantee_is_not_yet_what_the_code_needs(need: str, boundary: str) -> None:
    tenant, missing = TRUSTED, {"boundary": boundary, "missing": f"capability {need}"}
    with pytest.raises(PlacementRefused) as refusal:
        choose(tenant, make_controls(tenant=tenant, needs=[need]), Policy(), offered(boundary, abilities=frozenset()))
    assert missing in refusal.value.extra["candidates"]
    assert place(tenant, boundary, needs=[need]).boundary == boundary


def test_kind_never_satisfies_privileges_whatever_else_is_asked() -> None:
    assert refused(TRUSTED, "cluster/kind", needs=["privileged"]).extra["candidates"][-2] == {
        "boundary": "cluster/kind", "missing": "kernel >= dedicated",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tenant", "boundaries", "asked", "missing"),
    [
        (UNTRUSTED, ("namespace/runc",), {}, "kernel >= sandboxed"),
        (UNTRUSTED, ("namespace/gvisor",), {"isolation": "hard"}, "control plane >= isolated"),
        (TRUSTED, ("gvisor",), {"needs": ["privileged"]}, "kernel >= dedicated"),
        (TRUSTED, ("microvm",), {"needs": ["kubernetes-api"]}, "control plane >= dedicated"),
        (make_tenant(affinity="gpu"), ("gvisor",), {}, "nodes >= dedicated"),
        (UNTRUSTED, (), {"network": {"mode": "allow", "allow": ["a.example:443"]}}, "capability egress-allow-list"),
    ],
    ids=str,
)
def test_a_refusal_names_the_guarantee_that_is_missing(
    tenant: Tenant, boundaries: tuple[str, ...], asked: dict[str, Any], missing: str
) -> None:
    refusal = refused(tenant, *boundaries, **asked)

    assert missing in refusal.detail
    assert refusal.code == "placement_refused"
    assert refusal.extra["requirements"]
    assert refusal.extra["why"]
    assert all(candidate["missing"] for candidate in refusal.extra["candidates"])
    if boundaries:
        mine = next(c for c in refusal.extra["candidates"] if c["boundary"] == boundaries[0])
        assert mine["missing"] == missing


def test_without_any_worker_the_nearest_is_named() -> None:
    with pytest.raises(PlacementRefused, match=r"the nearest is gvisor: no live worker offers gvisor"):
        choose(UNTRUSTED, make_controls(), Policy(), [])


def test_what_a_probe_found_missing_is_said() -> None:
    broken = make_capabilities(available=False, missing=("no memory controller", "install runsc"))
    with pytest.raises(PlacementRefused, match="no memory controller; install runsc"):
        choose(UNTRUSTED, make_controls(), Policy(), [broken])


def test_one_worker_that_can_is_enough_and_a_runtime_must_be_offered() -> None:
    broken, good = make_capabilities(available=False, missing=("broken",)), make_capabilities()

    assert choose(UNTRUSTED, make_controls(), Policy(), [broken, good]).boundary == "gvisor"
    with pytest.raises(PlacementRefused, match=r"runtime python \(offered: default\)"):
        choose(UNTRUSTED, make_controls(), Policy(), [good], runtime="python")


def test_what_a_probe_measured_below_the_promise_counts() -> None:
    shared = Guarantees(kernel=Kernel.SHARED, nodes=Nodes.SHARED, control_plane=ControlPlane.ISOLATED)
    measured = [make_capabilities(guarantees=shared), make_capabilities()]
    with pytest.raises(PlacementRefused, match="kernel >= sandboxed"):
        choose(UNTRUSTED, make_controls(), Policy(), measured)


def test_the_placement_explains_itself_to_its_owner() -> None:
    placement = place(UNTRUSTED, "namespace/runc", "gvisor", "microvm", isolation="hard")
    rejected = {row.boundary: row.missing for row in placement.rejected}

    assert placement.why[0] == "tenant acme is untrusted: kernel >= sandboxed"
    assert placement.requirements == {"kernel": "sandboxed", "control_plane": "isolated"}
    assert rejected["namespace/runc"] == "kernel >= sandboxed"
    assert rejected["microvm"] == "nothing; gvisor ranks before it (30 < 50)"
    assert rejected["cluster/kind"] == "no live worker offers cluster/kind"
    assert set(rejected) == set(BOUNDARIES) - {"gvisor"}
    assert placement.policy == Policy().digest != Policy(ranks={"gvisor": 1}).digest
    assert place(TRUSTED).why == ("tenant partner is trusted and nothing more was asked",)


class TestPolicy:
    def test_it_ranks_anew(self) -> None:
        assert place(UNTRUSTED, policy=Policy(ranks={"microvm": 5})).boundary == "microvm"

    def test_its_floors_hold_for_their_trust_only(self) -> None:
        policy = Policy(floors={Trust.UNTRUSTED: {"kernel": "dedicated"}})

        assert place(UNTRUSTED, policy=policy).boundary == "microvm"
        assert place(TRUSTED, policy=policy).boundary == "namespace/runc"
        assert place(TRUSTED, policy=policy, code="untrusted").boundary == "microvm"

    def test_below_its_minimum_version_a_boundary_is_no_candidate(self) -> None:
        policy = Policy(minimum_versions={"gvisor": {"runsc": "20260202.0"}})

        assert place(UNTRUSTED, policy=policy).boundary == "namespace/gvisor"
        with pytest.raises(PlacementRefused, match=r"runsc 20260202.0 or later, by policy"):
            place(UNTRUSTED, "gvisor", policy=policy)

    @pytest.mark.parametrize(
        ("version", "minimum", "enough"),
        [
            ("release-20260101.0", "20260101.0", True), ("20260101.1", "20260101.0", True), ("9.10", "9.9", True),
            ("9.9", "9.10", False), ("", "1", False), ("unknown", "0", False), ("2", "1.9", True),
        ],
    )  # fmt: skip
    def test_versions_compare_by_their_numbers(self, version: str, minimum: str, enough: bool) -> None:
        assert version_at_least(version, minimum) is enough


LEVELS = {"kernel": Kernel, "nodes": Nodes, "control_plane": ControlPlane}
guarantees = st.builds(Guarantees, **{name: st.sampled_from(levels) for name, levels in LEVELS.items()})
policies = st.builds(
    Policy,
    ranks=st.dictionaries(st.sampled_from(BOUNDARIES), st.integers(-100, 100)),
    minimum_versions=st.dictionaries(
        st.sampled_from(BOUNDARIES),
        st.dictionaries(st.sampled_from(["runsc", "kata"]), st.sampled_from(["0", "20260101.0", "99999999"])),
    ),
    floors=st.dictionaries(
        st.sampled_from(Trust),
        st.fixed_dictionaries({}, optional={name: st.sampled_from(levels) for name, levels in LEVELS.items()}),
    ),
)
capabilities = st.lists(
    st.builds(
        Capabilities,
        boundary=st.sampled_from([*BOUNDARIES, "gvisor/other", "namespace/runc+affinity", ""]),
        available=st.booleans(),
        guarantees=st.none() | guarantees,
        abilities=st.sampled_from([frozenset(), frozenset({"egress-allow-list"})]),
        node_groups=st.sampled_from([frozenset(), frozenset({"gpu"})]),
        runtimes=st.just({"default": "sha256:0"}),
        versions=st.sampled_from([{}, {"runsc": "20260101.0"}]),
    ),
    max_size=12,
)
controls = st.builds(
    Controls,
    isolation=st.sampled_from(Isolation),
    needs=st.lists(st.sampled_from(Need), max_size=3).map(tuple),
    network=st.sampled_from([{"mode": "none"}, {"mode": "allow", "allow": ["a.example:443"]}]),
)
affinities = st.sampled_from([None, "gpu"])


@given(
    affinity=affinities, asked=controls, policy=policies, live=capabilities, code=st.sampled_from([None, "untrusted"])
)
def test_no_input_of_an_untrusted_tenant_ever_yields_a_shared_kernel(
    affinity: str | None, asked: Controls, policy: Policy, live: list[Capabilities], code: Trust | None
) -> None:
    tenant = make_tenant(affinity=affinity)
    applied = apply(asked.model_copy(update={"code": code and Trust(code)}), tenant)
    try:
        placement = choose(tenant, applied, policy, live)
    except PlacementRefused:
        return
    assert placement.guarantees.kernel is not Kernel.SHARED
    assert next(
        o for o in OFFERS if o.boundary == placement.boundary.removesuffix("+affinity")
    ).guarantees.kernel is not (Kernel.SHARED)


@given(trust=st.sampled_from(Trust), affinity=affinities, asked=controls, policy=policies, live=capabilities)
def test_what_is_chosen_covers_what_is_required_and_a_live_worker_can_build_it(
    trust: Trust, affinity: str | None, asked: Controls, policy: Policy, live: list[Capabilities]
) -> None:
    tenant = make_tenant(trust=trust, affinity=affinity)
    applied = apply(asked, tenant)
    needed, _ = require(tenant, applied, policy)
    try:
        placement = choose(tenant, applied, policy, live)
    except PlacementRefused:
        return
    for name in LEVELS:
        assert strength(getattr(placement.guarantees, name)) >= strength(getattr(needed, name))
    assert any(c.available and c.boundary == placement.boundary.removesuffix("+affinity") for c in live)


@given(trust=st.sampled_from(Trust), affinity=affinities, asked=controls, policy=policies)
def test_a_policy_and_a_tenants_own_request_only_ever_raise_requirements(
    trust: Trust, affinity: str | None, asked: Controls, policy: Policy
) -> None:
    tenant = make_tenant(trust=trust, affinity=affinity)
    least, _ = require(tenant, apply(Controls(), tenant), Policy())
    plain, _ = require(tenant, apply(asked, tenant), Policy())
    tightened, _ = require(tenant, apply(asked, tenant), policy)
    for name in LEVELS:
        assert strength(getattr(least, name)) <= strength(getattr(plain, name)) <= strength(getattr(tightened, name))
    assert set(plain.abilities) <= set(tightened.abilities)
