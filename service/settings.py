"""Every setting, in one frozen class. Environment variables carry the prefix BLASTDOOR_.

Only composition roots read this; logic is handed values. `.env.example` is made from it and compared in `make check`.
"""

import argparse
import difflib
import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.core.failpoints import parse
from service.core.webhooks.urls import read_pairs

Seconds = Annotated[float, Field(gt=0)]
_PREFIX = "BLASTDOOR_"
_NO_SETTINGS = {"BLASTDOOR_URL", "BLASTDOOR_KEY", "BLASTDOOR_SERVICE_KEY"}
"""For clients: where the service is, and with which key they come."""
_ALIKE = 0.7


class Settings(BaseSettings):
    # Without what was given: it may be a password, and the error stands in a log.
    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="ignore", hide_input_in_errors=True)

    environment: Literal["production", "development", "test"] = Field(
        "production",
        description="failpoints, and nodes of Cluster API that are no machines, exist only where this is test",
    )

    # Where state lives
    state_dir: Path = Field(Path("/var/lib/blastdoor"), description="blobs, imported runtimes, the embedded database")
    runtime_dir: Path = Field(Path("/run/blastdoor"), description="live boundaries of this host; keep the path short")
    database_url: str = Field("", description="SQLAlchemy URL; empty: SQLite in state_dir")
    database_roles: Annotated[str, Field(pattern=r"^([a-z][a-z0-9_]{0,39})?$")] = Field(
        "", description="PostgreSQL: migrate gives NAME_api, NAME_worker, ... each its rights; empty: one user for all"
    )
    redis_url: SecretStr = Field(SecretStr("redis://127.0.0.1:6379/0"), description="Celery's broker and hints")
    bus_url: SecretStr | None = Field(None, description="Redis of the event stream; empty: redis_url")
    stream_entries: int = Field(
        100_000,
        gt=0,
        description="events that the stream keeps; up to twice as many while one of its readers is behind",
    )
    policy_file: Path | None = Field(None, description="placement policy, YAML; it can only tighten")

    # The API
    host: str = Field("127.0.0.1", description="address the API listens on")
    port: int = Field(8700, ge=0, le=65535, description="port the API listens on")
    upload_max_bytes: int = Field(50 * 2**20, gt=0, description="bytes of one upload, all parts together")
    upload_deadline_s: Seconds = Field(120.0, description="an upload that is not complete by then is dropped")
    uploads_at_once: int = Field(16, gt=0, description="uploads being received at the same time; more get 503")

    # Workers
    site: str = Field(default_factory=socket.gethostname, description="this host's name in the installation")
    worker_concurrency: int = Field(
        default_factory=lambda: os.cpu_count() or 1, gt=0, description="runs at once on this host"
    )
    boundaries: tuple[str, ...] = Field(("gvisor",), description="boundary kinds this worker builds (JSON list)")
    runsc: Path = Field(Path("/usr/bin/runsc"), description="the gVisor runtime")
    kubeconfig: Path | None = Field(
        None, description="of the cluster that boundary namespace makes pods in, as the engine's user; empty: none"
    )
    kube_image: str = Field("", description="what pods are made of: an image of ours, by digest (NAME@sha256:...)")
    namespace_variants: tuple[Literal["runc", "gvisor", "kata-qemu", "kata-fc"], ...] = Field(
        ("runc", "gvisor"), description="variants of boundary namespace that this worker builds (JSON list)"
    )

    cluster_provisioners: tuple[Literal["kind", "capi"], ...] = Field(
        ("kind",), description="what boundary cluster makes clusters with (JSON list)"
    )
    cluster_images: dict[str, str] = Field(
        {}, description="of boundary cluster, runtime to image of ours by digest, `default` among them (JSON)"
    )
    cluster_archives: tuple[Path, ...] = Field(
        (), description="OCI archives that are loaded into each cluster of kind; without, its nodes have the images"
    )
    clusters_at_once: int = Field(2, gt=0, description="of each of these, clusters on this host at the same time")
    standby_clusters: int = Field(0, ge=0, description="clusters of kind kept ready before anybody asks")
    kind: Path = Field(Path("/usr/bin/kind"), description="the program that makes clusters in containers")
    docker: Path = Field(Path("/usr/bin/docker"), description="the container engine's command, for kind")
    docker_host: str = Field("unix:///var/run/docker.sock", description="the container engine's socket, on this host")
    kind_node_image: str = Field("", description="of kind's nodes, with gVisor in it, by digest; empty: none")
    capi_kubeconfig: Path | None = Field(
        None, description="of the management cluster of Cluster API, as the engine's user; empty: none"
    )
    capi_namespace: str = Field("blastdoor-clusters", description="there, for clusters of ours and nothing else")
    capi_topology: Path | None = Field(
        None, description="folder of templates of a cluster; empty: the one that is shipped"
    )
    capi_ready_s: Seconds = Field(900.0, description="a cluster of Cluster API that is not ready by then is given up")

    # Times; tests scale them down
    lease_s: Seconds = Field(30.0, description="a worker's right to act on a run, without a heartbeat")
    heartbeat_s: Seconds = Field(10.0, description="how often a worker renews it")
    self_fence_s: Seconds = Field(
        20.0, description="without a successful heartbeat for so long, a worker kills its own boundary"
    )
    cancel_poll_s: Seconds = Field(0.5, description="how often a worker asks whether its run was cancelled")
    max_queue_s: Seconds = Field(3600.0, description="a run queued longer ends errored / queue_expired")
    ring_after_s: Seconds = Field(30.0, description="what waits longer than this gets its doorbell rung again")
    housekeeping_s: Seconds = Field(10.0, description="how often the reaper and reconciler look")
    probe_s: Seconds = Field(30.0, description="how often a worker says that it lives")
    worker_fresh_s: Seconds = Field(90.0, description="a worker that was silent for longer is not counted on")
    quarantine_after_s: Seconds = Field(
        30.0, description="a boundary that resists destruction for longer is quarantined, and that is said"
    )
    site_silent_s: Seconds = Field(
        300.0, description="what a site has that was silent for longer counts as quarantined until it answers"
    )
    orders_poll_s: Seconds = Field(0.5, description="how often reapers and workers ask for operators' orders")
    canary_s: Seconds = Field(30.0, description="how often a run of our own goes through the whole pipeline")
    canary_within_s: Seconds = Field(15.0, description="one that takes longer makes the service unready")
    relay_lease_s: Seconds = Field(10.0, description="lease of the one relay that publishes")

    keep_runs_s: Seconds = Field(30 * 86400.0, description="a finished run is deleted after that time")
    keep_blobs_s: Seconds = Field(
        7 * 86400.0, description="bundle, output and artifacts of a finished run are deleted after that time"
    )

    keep_orphan_blobs_s: Annotated[float, Field(ge=3600)] = Field(
        3600.0, description="bytes that no run uses are deleted after that time; longer than any run or upload lasts"
    )

    # Webhooks
    secrets_key: SecretStr = Field(
        SecretStr(""),
        description="Fernet keys for webhook secrets, comma separated, the first encrypts; empty: no webhooks",
    )
    webhook_allow: str = Field(
        "",
        description="HOST:PORT,... that webhooks may go to whatever they are, http too; for development; empty: none",
    )
    webhook_lease_s: Seconds = Field(
        60.0, description="a delivery whose process died is made again after that time; longer than an attempt takes"
    )
    webhook_ca_file: Path | None = Field(
        None, description="PEM file of authorities that webhooks' receivers may have their certificates from, too"
    )
    keep_deliveries_s: Seconds = Field(
        7 * 86400.0, description="a webhook's delivery and its log are deleted that long after its end"
    )

    metrics_address: str = Field(
        "", description="HOST:PORT of Prometheus' /metrics, best on loopback; each process its own port; empty: off"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="of the structured logs")
    failpoints: str = Field(
        "", description="NAME:ACTION[@N],... for tests of faults; refused unless environment=test; empty: none"
    )

    @field_validator(
        "policy_file", "bus_url", "webhook_ca_file", "kubeconfig", "capi_kubeconfig", "capi_topology", mode="before"
    )
    @classmethod
    def _empty_is_absent(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("failpoints")
    @classmethod
    def _only_in_tests(cls, value: str, info: ValidationInfo) -> str:
        if parse(value) and info.data.get("environment") != "test":
            raise ValueError("failpoints exist only where environment=test")
        return value

    @model_validator(mode="after")
    def _a_worker_gives_up_before_its_run_is_taken_from_it(self) -> Self:
        if not self.heartbeat_s < self.self_fence_s < self.lease_s:
            raise ValueError(
                f"heartbeat_s < self_fence_s < lease_s must hold, and {self.heartbeat_s:g} < {self.self_fence_s:g} < "
                f"{self.lease_s:g} does not: a worker that cannot renew its lease must have ended its sandbox before "
                "the lease does"
            )
        return self

    @model_validator(mode="after")
    def _names_are_spelt_as_they_are(self) -> Self:
        meant = {name: near for name in unknown_names() if (near := _nearest(name)) is not None}
        if meant:
            rows = (f"{name} is no setting; did you mean {near}?" for name, near in meant.items())
            raise ValueError("; ".join(rows))
        return self

    @field_validator("webhook_allow")
    @classmethod
    def _are_pairs(cls, value: str) -> str:
        read_pairs(value)
        return value

    @field_validator("metrics_address")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        if value:
            host, _, port = value.rpartition(":")
            ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
            if not (port.isascii() and port.isdigit() and int(port) <= 65535):
                raise ValueError("expected HOST:PORT, such as 127.0.0.1:9100")
        return value

    @property
    def sql_url(self) -> str:
        return self.database_url or f"sqlite:///{self.state_dir / 'blastdoor.db'}"

    @property
    def broker_url(self) -> str:
        return self.redis_url.get_secret_value()

    @property
    def stream_url(self) -> str:
        return (self.bus_url or self.redis_url).get_secret_value()


def unknown_names(environment: Mapping[str, str] = os.environ) -> Sequence[str]:
    """Variables with our prefix that no setting has, and that none of our commands reads."""
    known = {(_PREFIX + name).upper() for name in Settings.model_fields} | _NO_SETTINGS
    return sorted(name for name in environment if name.upper().startswith(_PREFIX) and name.upper() not in known)


def _nearest(name: str) -> str | None:
    """The setting that was probably meant."""
    words = [field.upper() for field in Settings.model_fields]
    found = difflib.get_close_matches(name.upper().removeprefix(_PREFIX), words, n=1, cutoff=_ALIKE)
    return _PREFIX + found[0] if found else None


def env_example() -> str:
    """The text of `.env.example`: every setting with its default and what it is for."""
    lines = ["# Every setting of Blastdoor, with its default. Made by: python -m service.settings --env-example"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default_factory is not None else _shown(field.default)
        lines += [f"\n# {field.description}", f"# BLASTDOOR_{name.upper()}={default}"]
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{item}"' for item in value) + "]"
    return str(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prints the settings' documentation.")
    parser.add_argument("--env-example", action="store_true", required=True)
    parser.parse_args()
    print(env_example(), end="")
