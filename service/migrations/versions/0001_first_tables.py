"""The first tables: tenants and keys, runs, their events, workers."""

import secrets
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    _tenancy()
    _runs()
    _telling()
    _operating()
    _webhooks()
    op.bulk_insert(
        sa.table("installation", sa.column("one"), sa.column("id")), [{"one": 1, "id": secrets.token_hex(6)}]
    )
    op.bulk_insert(
        sa.table("relay_state", sa.column("one"), sa.column("last_stamp"), sa.column("owed")),
        [{"one": 1, "last_stamp": 0, "owed": "{}"}],
    )


def _only(where: str) -> dict[str, Any]:
    """A partial index, in both databases."""
    return {"sqlite_where": sa.text(where), "postgresql_where": sa.text(where)}


def _tenancy() -> None:
    op.create_table(
        "installation",
        sa.Column("one", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.CheckConstraint("one = 1", name="ck_installation_one_row"),
        sa.PrimaryKeyConstraint("one", name="pk_installation"),
    )
    op.create_table(
        "service",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_service"),
        sa.UniqueConstraint("name", name="uq_service_name"),
    )
    op.create_table(
        "tenant",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("trust", sa.Text(), nullable=False),
        sa.Column("affinity", sa.Text()),
        sa.Column("concurrent", sa.Integer(), nullable=False),
        sa.Column("queued", sa.Integer(), nullable=False),
        sa.Column("storage_bytes", sa.BigInteger(), nullable=False),
        sa.Column("ceilings", sa.Text(), nullable=False),
        sa.Column("service_id", sa.Text()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("last_served", sa.BigInteger()),
        sa.Column("deleted_at", sa.BigInteger()),
        sa.Column("purged_at", sa.BigInteger()),
        sa.ForeignKeyConstraint(["service_id"], ["service.id"], name="fk_tenant_service_id"),
        sa.PrimaryKeyConstraint("name", name="pk_tenant"),
    )
    op.create_index("ix_tenant_service_id", "tenant", ["service_id"])
    op.create_table(
        "api_key",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text()),
        sa.Column("service_id", sa.Text()),
        sa.Column("minted_by", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at", sa.BigInteger()),
        sa.ForeignKeyConstraint(["service_id"], ["service.id"], name="fk_api_key_service_id"),
        sa.ForeignKeyConstraint(["tenant"], ["tenant.name"], name="fk_api_key_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_api_key"),
        sa.UniqueConstraint("hash", name="uq_api_key_hash"),
    )
    op.create_index("ix_api_key_minted_by", "api_key", ["minted_by"], **_only("revoked_at IS NULL"))
    op.create_index("ix_api_key_tenant", "api_key", ["tenant"])
    op.create_table(
        "worker",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("capabilities", sa.Text(), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=False, server_default=sa.text("false")),
        sa.Column("measured_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_worker"),
    )


def _runs() -> None:
    op.create_table(
        "run",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("boundary", sa.Text(), nullable=False),
        sa.Column("runtime", sa.Text(), nullable=False),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text()),
        sa.Column("reason", sa.Text()),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("destroyed_fence", sa.Integer(), nullable=False),
        sa.Column("quarantined_fence", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("last_seq", sa.Integer(), nullable=False),
        sa.Column("phase_seq", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.Text()),
        sa.Column("lease_until", sa.BigInteger()),
        sa.Column("site", sa.Text()),
        sa.Column("cancel_requested_by", sa.Text()),
        sa.Column("traceparent", sa.Text()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("queued_at", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.BigInteger()),
        sa.Column("finished_at", sa.BigInteger()),
        sa.Column("boundary_destroyed_at", sa.BigInteger()),
        sa.Column("blobs_purged_at", sa.BigInteger()),
        sa.Column("head", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["tenant"], ["tenant.name"], name="fk_run_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_run"),
    )
    op.create_index(
        "ix_run_claimable",
        "run",
        ["tenant", "id", "boundary", "runtime"],
        **_only("phase = 'queued' AND fence = destroyed_fence"),
    )
    op.create_index("ix_run_lease_until", "run", ["lease_until"], **_only("lease_until IS NOT NULL"))
    op.create_index("ix_run_not_known_gone", "run", ["site", "id"], **_only("fence > destroyed_fence"))
    op.create_index("ix_run_finished_at", "run", ["finished_at", "id"], **_only("finished_at IS NOT NULL"))
    op.create_index(
        "ix_run_keeps_blobs",
        "run",
        ["finished_at", "id"],
        **_only("finished_at IS NOT NULL AND blobs_purged_at IS NULL"),
    )
    op.create_index("ix_run_queued", "run", ["id"], **_only("phase = 'queued'"))
    op.create_index("ix_run_queue", "run", ["boundary", "id", "phase"], **_only("phase = 'queued'"))
    op.create_index("ix_run_tenant_id", "run", ["tenant", "id"])
    op.create_index("ix_run_tenant_outcome_id", "run", ["tenant", "outcome", "id"], **_only("outcome IS NOT NULL"))
    op.create_index("ix_run_tenant_phase_id", "run", ["tenant", "phase", "id"])
    op.create_table(
        "run_input",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("scenario", sa.Text(), nullable=False),
        sa.Column("bundle", sa.Text()),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_run_input_run_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", name="pk_run_input"),
    )
    op.create_table(
        "run_result",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("result", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_run_result_run_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", name="pk_run_result"),
    )
    op.create_table(
        "run_blob",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_run_blob_run_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "digest", name="pk_run_blob"),
    )
    op.create_index("ix_run_blob_tenant_digest_bytes", "run_blob", ["tenant", "digest", "bytes"])
    op.create_table(
        "run_news",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("k", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name="fk_run_news_run_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "seq", "k", name="pk_run_news"),
    )
    op.create_table(
        "idempotency",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("taken_at", sa.BigInteger(), nullable=False),
        sa.Column("content_digest", sa.Text()),
        sa.Column("answer", sa.Text()),
        sa.PrimaryKeyConstraint("tenant", "key", name="pk_idempotency"),
    )
    op.create_index("ix_idempotency_taken_at", "idempotency", ["taken_at"])


def _telling() -> None:
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("event_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("internal", sa.Boolean(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("terminal", sa.Boolean(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("pub_seq", sa.BigInteger()),
        sa.Column("published", sa.Boolean(), nullable=False),
        sa.Column("fanned", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_outbox"),
        sa.UniqueConstraint("event_id", name="uq_outbox_event_id"),
        sa.UniqueConstraint("pub_seq", name="uq_outbox_pub_seq"),
        sa.UniqueConstraint("run_id", "seq", name="uq_outbox_run_id_seq"),
    )
    op.create_index("ix_outbox_unfanned", "outbox", ["id"], **_only("NOT fanned AND NOT internal"))
    op.create_index("ix_outbox_unpublished", "outbox", ["pub_seq"], **_only("pub_seq IS NOT NULL AND NOT published"))
    op.create_index("ix_outbox_unstamped", "outbox", ["id"], **_only("pub_seq IS NULL AND NOT internal"))
    op.create_index("uq_outbox_terminal", "outbox", ["run_id"], unique=True, **_only("terminal"))
    op.create_table(
        "relay_state",
        sa.Column("one", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("owner", sa.Text()),
        sa.Column("lease_until", sa.BigInteger()),
        sa.Column("last_stamp", sa.BigInteger(), nullable=False),
        sa.Column("bus_identity", sa.Text()),
        sa.Column("owed", sa.Text(), nullable=False),
        sa.CheckConstraint("one = 1", name="ck_relay_state_one_row"),
        sa.PrimaryKeyConstraint("one", name="pk_relay_state"),
    )


def _webhooks() -> None:
    op.create_table(
        "webhook_endpoint",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text()),
        sa.Column("service_id", sa.Text()),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("types", sa.Text(), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("disabled_reason", sa.Text()),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("old_secret", sa.Text()),
        sa.Column("old_secret_until", sa.BigInteger()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("(tenant IS NULL) <> (service_id IS NULL)", name="ck_webhook_endpoint_one_owner"),
        sa.ForeignKeyConstraint(["service_id"], ["service.id"], name="fk_webhook_endpoint_service_id"),
        sa.ForeignKeyConstraint(["tenant"], ["tenant.name"], name="fk_webhook_endpoint_tenant"),
        sa.PrimaryKeyConstraint("id", name="pk_webhook_endpoint"),
    )
    op.create_index("ix_webhook_endpoint_service_id", "webhook_endpoint", ["service_id"])
    op.create_index("ix_webhook_endpoint_tenant", "webhook_endpoint", ["tenant"])
    op.create_table(
        "webhook_delivery",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("endpoint_id", sa.Text(), nullable=False),
        sa.Column("event_id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("next_at", sa.BigInteger()),
        sa.Column("status", sa.Integer()),
        sa.Column("error", sa.Text()),
        sa.Column("settled_at", sa.BigInteger()),
        sa.ForeignKeyConstraint(
            ["endpoint_id"], ["webhook_endpoint.id"], name="fk_webhook_delivery_endpoint_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_webhook_delivery"),
        sa.UniqueConstraint("endpoint_id", "event_id", name="uq_webhook_delivery_endpoint_id_event_id"),
    )
    op.create_index("ix_webhook_delivery_dead", "webhook_delivery", ["id"], **_only("state = 'dead'"))
    op.create_index(
        "ix_webhook_delivery_pending", "webhook_delivery", ["endpoint_id", "next_at", "id"],
        **_only("state = 'pending'"),
    )  # fmt: skip
    op.create_index(
        "ix_webhook_delivery_settled", "webhook_delivery", ["settled_at"], **_only("settled_at IS NOT NULL")
    )
    op.create_table(
        "webhook_attempt",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("delivery_id", sa.Text(), nullable=False),
        sa.Column("endpoint_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Integer()),
        sa.Column("error", sa.Text()),
        sa.Column("next_at", sa.BigInteger()),
        sa.Column("duration", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["delivery_id"], ["webhook_delivery.id"], name="fk_webhook_attempt_delivery_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_webhook_attempt"),
        sa.UniqueConstraint("delivery_id", "attempt", name="uq_webhook_attempt_delivery_id_attempt"),
    )
    op.create_index("ix_webhook_attempt_endpoint_id_id", "webhook_attempt", ["endpoint_id", "id"])


def _operating() -> None:
    op.create_table(
        "site",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("last_seen_at", sa.BigInteger(), nullable=False),
        sa.Column("asked_at", sa.BigInteger()),
        sa.Column("forgotten_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("name", name="pk_site"),
    )
    op.create_table(
        "inventory",
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("variant", sa.Text(), nullable=False),
        sa.Column("run", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("observed_at", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("resisting_since", sa.BigInteger()),
        sa.ForeignKeyConstraint(["site"], ["site.name"], name="fk_inventory_site"),
        sa.PrimaryKeyConstraint("site", "name", name="pk_inventory"),
    )
    op.create_table(
        "cleanup",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("asked_by", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("force", sa.Boolean(), nullable=False),
        sa.Column("applied_at", sa.BigInteger()),
        sa.Column("done_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name="pk_cleanup"),
    )
    op.create_table(
        "cleanup_action",
        sa.Column("cleanup_id", sa.Text(), nullable=False),
        sa.Column("n", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("ref", sa.Text(), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("ordered", sa.Boolean(), nullable=False),
        sa.Column("result", sa.Text()),
        sa.Column("done_at", sa.BigInteger()),
        sa.ForeignKeyConstraint(
            ["cleanup_id"], ["cleanup.id"], name="fk_cleanup_action_cleanup_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("cleanup_id", "n", name="pk_cleanup_action"),
    )
    op.create_index(
        "ix_cleanup_action_ordered",
        "cleanup_action",
        ["site", "cleanup_id", "n"],
        **_only("ordered AND done_at IS NULL"),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("what", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("result", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
