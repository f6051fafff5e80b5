"""What this host is told by its environment: one reading for the processes that play runs, and for commands that say
what those can do."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_settings import SettingsError

from service.core.boundary import ClusterChoices
from service.settings import Settings


class WrongSetting(Exception):
    """No worker starts here; the message says which variable is wrong, and not what it holds."""


@dataclass(frozen=True)
class Told:
    """What a worker would build here, beyond its own host's sandboxes."""

    namespace_variants: Sequence[str]
    clusters: ClusterChoices


def read_environment() -> Told:
    """Raises WrongSetting."""
    try:
        settings = Settings()
    except ValidationError as error:
        rows = (f"{_variable(row['loc'])}{row['msg']}" for row in error.errors(include_input=False))
        raise WrongSetting("; ".join(rows)) from error
    except SettingsError as error:  # no JSON where there should be some
        raise WrongSetting(str(error)) from error
    return Told(settings.namespace_variants, cluster_choices(settings))


def cluster_choices(settings: Settings) -> ClusterChoices:
    return ClusterChoices(
        provisioners=settings.cluster_provisioners, images=settings.cluster_images, archives=settings.cluster_archives,
        at_once=settings.clusters_at_once, standby=settings.standby_clusters, kind=settings.kind,
        docker=settings.docker, docker_host=settings.docker_host, node_image=settings.kind_node_image,
        ready_s=settings.capi_ready_s, capi_kubeconfig=settings.capi_kubeconfig, capi_namespace=settings.capi_namespace,
        capi_topology=settings.capi_topology, development=settings.environment == "test",
    )  # fmt: skip


def _variable(where: tuple[int | str, ...]) -> str:
    return f"BLASTDOOR_{str(where[0]).upper()}: " if where else ""
