"""The end of a cluster of Cluster API, and how many there are at once. The provider is played, well and badly."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.core.errors import NotYetDestroyed, ProvisionFailed
from tests.cluster.capi_sites import Site, management, post, site
from tests.cluster.pods import eventually
from tests.sandboxes import Never

__all__ = ["management", "site"]


# --- Deletion ---------------------------------------------------------------------------------------------------------


def test_an_end_that_is_held_up_is_said_with_what_holds_it_and_comes_once_it_is_let_go(site: Site) -> None:
    ref = site.ref()
    site.create(ref)
    site.conduct.lets_go = False
    with pytest.raises(NotYetDestroyed, match=r"held by cluster\.cluster\.x-k8s\.io.*still attached to a volume"):
        site.provisioner.destroy(ref)
    assert not site.folder(ref).exists()  # nobody shall use it any more
    assert [one.name for one in site.provisioner.discover()] == [ref.name]
    began = time.monotonic()
    with pytest.raises(NotYetDestroyed):
        site.provisioner.destroy(ref)
    assert time.monotonic() - began < 10  # what has resisted keeps the reaper from nothing else
    site.conduct.lets_go = True
    site.gone(ref)


def test_a_machine_that_outlives_its_cluster_is_not_overlooked(site: Site) -> None:
    ref = site.ref()
    site.create(ref)
    site.conduct.orphans = True
    with pytest.raises(NotYetDestroyed, match=f"Machine {ref.name}-0"):
        site.provisioner.destroy(ref)
    assert site.provider.list("Cluster") == []
    assert [one.name for one in site.provisioner.discover()] == [ref.name]  # by its place
    site.provider.let_all_go()
    site.gone(ref)


def test_another_installations_cluster_is_left_alone(site: Site) -> None:
    ref = site.ref()
    site.create(ref)
    stranger = site.another(installation="another0")
    theirs = ref.model_copy(update={"installation": "another0"})
    assert list(stranger.discover()) == []
    stranger.destroy(ref)
    stranger.destroy(theirs)
    with pytest.raises(ProvisionFailed, match="and not of this run"):
        stranger.create(theirs, cancelled=Never(), tell=site.told.append)
    assert len(site.provider.left()) == 5
    (cluster,) = site.provider.list("Cluster")
    assert "deletionTimestamp" not in cluster["metadata"]
    stranger.close()
    site.gone(ref)  # the control: its own may


def test_a_newer_cluster_of_that_name_is_left_alone(site: Site) -> None:
    """Somebody deleted ours, and made another that only has its name."""
    ref = site.ref()
    manifest = {
        "apiVersion": "cluster.x-k8s.io/v1beta2", "kind": "Cluster",
        "metadata": {"name": ref.name, "namespace": site.provider.namespace},
        "spec": {"topology": {"classRef": {"name": "blastdoor"}, "version": "v1.36.2"}},
    }  # fmt: skip
    post(site.admin, manifest)
    site.provisioner.destroy(ref)
    with pytest.raises(ProvisionFailed, match="and not of this run"):
        site.create(ref)
    (cluster,) = site.provider.list("Cluster")
    assert "deletionTimestamp" not in cluster["metadata"]


# --- So many at once --------------------------------------------------------------------------------------------------


def test_no_more_clusters_than_there_are_places_whoever_asks_at_once(site: Site) -> None:
    """Six workers, two places: two get one, the others are told at once."""
    refs = [site.ref() for _ in range(6)]
    provisioners = [site.another() for _ in refs]

    def make(at: int) -> str:
        try:
            provisioners[at].create(refs[at], cancelled=Never(), tell=lambda _: None, patience_s=0)
        except ProvisionFailed as error:
            return str(error)
        return "made"

    with ThreadPoolExecutor(6) as threads:
        said = list(threads.map(make, range(6)))
    assert sorted(said) == ["after 0 s there are 2 clusters, and no more are allowed at once"] * 4 + ["made"] * 2
    assert site.provider.most == 2
    made = [ref for ref, word in zip(refs, said, strict=True) if word == "made"]
    with ThreadPoolExecutor(1) as threads:  # the control: a place that is free again goes to who waits for it
        waits = threads.submit(site.create, site.ref())
        eventually(lambda: site.told == ["waiting for another cluster to go"])
        site.gone_of(made[0])
        assert waits.result(timeout=90).exists()
    for one in provisioners:
        one.close()


def test_a_cluster_that_is_being_deleted_still_has_its_place(site: Site) -> None:
    site.conduct.lets_go, one = False, site.another(max_clusters=1)
    ref = site.ref()
    one.create(ref, cancelled=Never(), tell=lambda _: None, patience_s=0)
    with pytest.raises(NotYetDestroyed):
        one.destroy(ref)
    with pytest.raises(ProvisionFailed, match="there are 1 clusters"):
        one.create(site.ref(), cancelled=Never(), tell=lambda _: None, patience_s=0)
    one.close()


def test_a_cap_that_was_lowered_counts_what_is_there(site: Site) -> None:
    first, second = site.ref(), site.ref()
    site.create(first)
    site.create(second)
    site.gone_of(first)  # its place is free, and has a lower number than the other's
    one = site.another(max_clusters=1)
    with pytest.raises(ProvisionFailed, match="there are 1 clusters"):
        one.create(site.ref(), cancelled=Never(), tell=lambda _: None, patience_s=0)
    one.close()
