"""A management cluster, as its API server has it: objects of whatever kinds its providers define, in one namespace.

Which kinds there are, and of which version, is asked each time: a provider may be added or brought up to date while we
run, and what deletes must see the kinds of today.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import quote, urlencode

from workers.boundaries.cluster.capi_render import is_capi
from workers.kube import Cluster, ClusterError, Manifest, together

OWNER = "blastdoor"
_APPLY = "application/apply-patch+yaml"
_NOT_FOUND = 404


@dataclass(frozen=True)
class Resource:
    """One kind, as a path names it. `version` has the group in it: `cluster.x-k8s.io/v1beta2`."""

    version: str
    plural: str
    kind: str

    @property
    def group(self) -> str:
        return self.version.rpartition("/")[0]


LEASES = Resource("coordination.k8s.io/v1", "leases", "Lease")
SECRETS = Resource("v1", "secrets", "Secret")


@dataclass(frozen=True)
class Right:
    """To do `verb` to all of one kind in a namespace."""

    verb: str
    group: str
    plural: str
    namespace: str

    def __str__(self) -> str:
        return f"{self.verb} {self.plural}" + (f".{self.group}" if self.group else "") + f" in {self.namespace}"


class Management:
    """One namespace of it. What is asked is raised as ClusterError, or one of its kinds."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self._cluster = cluster
        self._namespace = namespace

    def close(self) -> None:
        self._cluster.close()

    # --- Kinds --------------------------------------------------------------------------------------------------------

    def groups(self) -> Mapping[str, Sequence[str]]:
        """The groups of Cluster API and its providers -> all versions that are served (`group/version`), the one that
        the API server would rather speak first. Two providers in one group need not be of one version."""
        listed = self._cluster.raw("GET", "/apis").body
        return {one["name"]: _served(one) for one in listed["groups"] if is_capi(one["name"])}

    def kinds(self, version: str) -> Mapping[str, Resource]:
        """By their names, those of a version (`group/version`) that lie in a namespace and can be listed; none where it
        is not served."""
        try:
            listed = self._cluster.raw("GET", f"/apis/{version}").body
        except ClusterError as error:
            if error.status != _NOT_FOUND:
                raise
            return {}
        return {
            one["kind"]: Resource(version, one["name"], one["kind"])
            for one in listed["resources"]
            if one["namespaced"] and "/" not in one["name"] and "list" in one["verbs"]
        }

    def every_kind(self) -> Sequence[Resource]:
        """All that a cluster can be made of, each once."""
        versions = [version for served in self.groups().values() for version in served]
        found = together([partial(self.kinds, version) for version in versions]) if versions else []
        once: dict[tuple[str, str], Resource] = {}
        for resource in (one for kinds in found for one in kinds.values()):
            once.setdefault((resource.group, resource.plural), resource)
        return list(once.values())

    def kind_of(self, manifest: Manifest) -> Resource:
        found = self.kinds(str(manifest["apiVersion"])).get(str(manifest["kind"]))
        if found is None:
            raise ClusterError(f"the management cluster has no {manifest['kind']} of {manifest['apiVersion']}")
        return found

    # --- Objects ------------------------------------------------------------------------------------------------------

    def get(self, resource: Resource, name: str, *, namespace: str | None = None) -> Manifest | None:
        """None when it is not there."""
        try:
            return self._cluster.raw("GET", self._path(resource, name, namespace)).body
        except ClusterError as error:
            if error.status != _NOT_FOUND:
                raise
            return None

    def list(self, resource: Resource, labels: Mapping[str, str]) -> list[Manifest]:
        chosen = urlencode({"labelSelector": ",".join(f"{key}={value}" for key, value in labels.items())})
        try:
            listed = self._cluster.raw("GET", f"{self._path(resource)}?{chosen}").body
        except ClusterError as error:
            if error.status != _NOT_FOUND:  # the kind went away meanwhile, and all of it
                raise
            return []
        return [{"apiVersion": resource.version, "kind": resource.kind} | one for one in listed["items"]]

    def apply(self, manifest: Manifest) -> Manifest:
        """Server-side apply -> the object as it stands. Not by force: what another owner says otherwise is not taken
        over, which is Taken."""
        name = str(manifest["metadata"]["name"])
        where = f"{self._path(self.kind_of(manifest), name)}?{urlencode({'fieldManager': OWNER})}"
        return self._cluster.raw("PATCH", where, body=manifest, content=_APPLY).body

    def create(self, resource: Resource, manifest: Manifest) -> Manifest:
        return self._cluster.raw("POST", self._path(resource), body=manifest).body

    def delete(self, resource: Resource, found: Manifest) -> None:
        """Asks for the end of this very object. Of what belongs to a Cluster its own finalizer decides the order, so
        nobody is told to take it away beforehand."""
        metadata = found["metadata"]
        body = {
            "apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background",
            "preconditions": {"uid": metadata["uid"]},
        }  # fmt: skip
        try:
            self._cluster.raw("DELETE", self._path(resource, metadata["name"]), body=body)
        except ClusterError as error:
            now = self.get(resource, metadata["name"]) if error.status != _NOT_FOUND else None
            if now is not None and now["metadata"]["uid"] == metadata["uid"]:
                raise

    # --- Other questions ----------------------------------------------------------------------------------------------

    def version(self) -> str:
        return str(self._cluster.raw("GET", "/version").body["gitVersion"])

    def refused(self, rights: Sequence[Right]) -> Sequence[Right]:
        """Those that we do not have, by the API server's own authorizer."""
        answers = together([partial(self._may, right) for right in rights])
        return [right for right, may in zip(rights, answers, strict=True) if not may]

    def _may(self, right: Right) -> bool:
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {
                "resourceAttributes": {
                    "namespace": right.namespace, "verb": right.verb, "group": right.group, "resource": right.plural,
                }
            },
        }  # fmt: skip
        where = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        return bool(self._cluster.raw("POST", where, body=review).body["status"]["allowed"])

    def _path(self, resource: Resource, name: str = "", namespace: str | None = None) -> str:
        root = "/apis" if "/" in resource.version else "/api"
        where = f"{root}/{resource.version}/namespaces/{quote(namespace or self._namespace, safe='')}/{resource.plural}"
        return f"{where}/{quote(name, safe='')}" if name else where


def _served(group: Manifest) -> Sequence[str]:
    first = str(group["preferredVersion"]["groupVersion"])
    served = [str(one["groupVersion"]) for one in group["versions"]]
    return [first, *(version for version in served if version != first)]


__all__ = ["LEASES", "SECRETS", "Management", "Resource", "Right"]
