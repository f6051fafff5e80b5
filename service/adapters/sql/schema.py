"""The tables. `service/migrations` makes them; a test compares the two on both databases.

Words, numbers and instants that are queried are columns; everything else is JSON text, written and read whole. Text
that guests or customers wrote is only ever inside JSON, where PostgreSQL accepts the NUL that plain text may not have.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from service.adapters.sql.engine import Instant, Span

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

# Partial indexes are used only where a query says the same words, so both take them from here. SQLite keeps no
# statistics, and without a hint prefers whatever index matches most columns to the one that is small.
IS_QUEUED = "phase = 'queued'"
IS_ACTIVE = "phase IN ('provisioning', 'running', 'collecting')"
IS_CLAIMABLE = "phase = 'queued' AND fence = destroyed_fence"
NOT_KNOWN_GONE = "fence > destroyed_fence"
HAS_ENDED = "finished_at IS NOT NULL"
KEEPS_BLOBS = "finished_at IS NOT NULL AND blobs_purged_at IS NULL"
UNFANNED = "NOT fanned AND NOT internal"
IS_PENDING = "state = 'pending'"
IS_DEAD = "state = 'dead'"
IS_SETTLED = "settled_at IS NOT NULL"
IS_ORDERED = "ordered AND done_at IS NULL"


def indexed_by(name: str) -> str:
    """For `Select.with_hint(..., dialect_name="sqlite")`: this index, or an error."""
    return f"INDEXED BY {name}"


installation = Table(
    "installation", metadata,
    Column("one", Integer, primary_key=True, autoincrement=False),
    Column("id", Text, nullable=False),
    CheckConstraint("one = 1", name="one_row"),
)  # fmt: skip

service = Table(
    "service", metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("created_at", Instant, nullable=False),
)  # fmt: skip

tenant = Table(
    "tenant", metadata,
    Column("name", Text, primary_key=True),
    Column("trust", Text, nullable=False),
    Column("affinity", Text),
    Column("concurrent", Integer, nullable=False),
    Column("queued", Integer, nullable=False),
    Column("storage_bytes", BigInteger, nullable=False),
    Column("ceilings", Text, nullable=False),
    Column("service_id", Text, ForeignKey("service.id")),
    Column("created_at", Instant, nullable=False),
    Column("last_served", Instant),  # when a run of theirs was last claimed: the longest ago goes first
    Column("deleted_at", Instant),  # the row stays, so that the name stays taken
    Column("purged_at", Instant),  # of a deleted one: nothing else of it is left
    Index("ix_tenant_service_id", "service_id"),
)  # fmt: skip

api_key = Table(
    "api_key", metadata,
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("hash", Text, nullable=False, unique=True),
    Column("tenant", Text, ForeignKey("tenant.name")),
    Column("service_id", Text, ForeignKey("service.id")),
    Column("minted_by", Text, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("revoked_at", Instant),
    Index("ix_api_key_tenant", "tenant"),
    Index("ix_api_key_minted_by", "minted_by", sqlite_where=text("revoked_at IS NULL"),
          postgresql_where=text("revoked_at IS NULL")),
)  # fmt: skip

run = Table(
    "run", metadata,
    Column("id", Text, primary_key=True),  # UUIDv7: newest first is id descending
    Column("tenant", Text, ForeignKey("tenant.name"), nullable=False),
    Column("boundary", Text, nullable=False),  # `Placement.queue`: with the node group, where it has one
    Column("runtime", Text, nullable=False),
    Column("phase", Text, nullable=False),
    Column("outcome", Text),
    Column("reason", Text),
    Column("attempt", Integer, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("destroyed_fence", Integer, nullable=False),  # the highest fence whose boundary is known to be gone
    Column("quarantined_fence", Integer, nullable=False, server_default="0"),  # whose boundary was said to resist
    Column("last_seq", Integer, nullable=False),  # of its events
    Column("phase_seq", Integer, nullable=False),  # of the event that brought it to its phase
    Column("lease_owner", Text),
    Column("lease_until", Instant),  # set in the active phases only
    Column("site", Text),  # where its latest boundary is, or was
    Column("cancel_requested_by", Text),
    Column("traceparent", Text),  # W3C, of the request that submitted it
    Column("created_at", Instant, nullable=False),
    Column("queued_at", Instant, nullable=False),
    Column("started_at", Instant),
    Column("finished_at", Instant),
    Column("boundary_destroyed_at", Instant),
    Column("blobs_purged_at", Instant),  # its blobs were given up for their age; the record stays
    Column("head", Text, nullable=False),  # JSON `documents.Head`: what was said at submission and never changes
    Index("ix_run_tenant_id", "tenant", "id"),
    Index("ix_run_tenant_phase_id", "tenant", "phase", "id"),
    Index("ix_run_tenant_outcome_id", "tenant", "outcome", "id",
          sqlite_where=text("outcome IS NOT NULL"), postgresql_where=text("outcome IS NOT NULL")),
    # By the id first: else PostgreSQL sorts all that a tenant has in the queue for a worker with two runtimes.
    Index("ix_run_claimable", "tenant", "id", "boundary", "runtime",
          sqlite_where=text(IS_CLAIMABLE), postgresql_where=text(IS_CLAIMABLE)),
    Index("ix_run_queued", "id", sqlite_where=text(IS_QUEUED), postgresql_where=text(IS_QUEUED)),
    # With the phase in it too, SQLite counts the queue without looking at its rows.
    Index("ix_run_queue", "boundary", "id", "phase",
          sqlite_where=text(IS_QUEUED), postgresql_where=text(IS_QUEUED)),
    Index("ix_run_lease_until", "lease_until",
          sqlite_where=text("lease_until IS NOT NULL"), postgresql_where=text("lease_until IS NOT NULL")),
    Index("ix_run_not_known_gone", "site", "id",
          sqlite_where=text(NOT_KNOWN_GONE), postgresql_where=text(NOT_KNOWN_GONE)),
    Index("ix_run_finished_at", "finished_at", "id",
          sqlite_where=text(HAS_ENDED), postgresql_where=text(HAS_ENDED)),
    Index("ix_run_keeps_blobs", "finished_at", "id",
          sqlite_where=text(KEEPS_BLOBS), postgresql_where=text(KEEPS_BLOBS)),
)  # fmt: skip

# Apart from `run`, so that a change of phase does not rewrite megabytes.
run_input = Table(
    "run_input", metadata,
    Column("run_id", Text, ForeignKey("run.id", ondelete="CASCADE"), primary_key=True),
    Column("scenario", Text, nullable=False),
    Column("bundle", Text),
)  # fmt: skip

run_result = Table(
    "run_result", metadata,
    Column("run_id", Text, ForeignKey("run.id", ondelete="CASCADE"), primary_key=True),
    Column("result", Text, nullable=False),
)  # fmt: skip

# Which blobs a run uses: what nobody uses any more may be deleted. With the size in the index, a tenant's storage is
# summed without looking at the rows. One row, `live:RUN`, stands for what the run told live.
run_blob = Table(
    "run_blob", metadata,
    Column("run_id", Text, ForeignKey("run.id", ondelete="CASCADE"), primary_key=True),
    Column("digest", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Index("ix_run_blob_tenant_digest_bytes", "tenant", "digest", "bytes"),
)  # fmt: skip

# What is told of a run while it goes on, for whoever watches; `data` is JSON in ASCII on one line. See core/news.py.
run_news = Table(
    "run_news", metadata,
    Column("run_id", Text, ForeignKey("run.id", ondelete="CASCADE"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("k", Integer, primary_key=True, autoincrement=False),
    Column("kind", Text, nullable=False),
    Column("data", Text, nullable=False),
)  # fmt: skip

idempotency = Table(
    "idempotency", metadata,
    Column("tenant", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("token", Text, nullable=False),
    Column("taken_at", Instant, nullable=False),
    Column("content_digest", Text),
    Column("answer", Text),
    Index("ix_idempotency_taken_at", "taken_at"),
)  # fmt: skip

# No foreign key to `run`: an event outlives the run that its owner deleted, until it is purged by age.
outbox = Table(
    "outbox", metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("event_id", Text, nullable=False, unique=True),
    Column("run_id", Text, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("internal", Boolean, nullable=False),  # of a tenant of the platform's own: kept, never relayed
    Column("type", Text, nullable=False),
    Column("terminal", Boolean, nullable=False),
    Column("event", Text, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("pub_seq", BigInteger, unique=True),
    Column("published", Boolean, nullable=False),
    Column("fanned", Boolean, nullable=False),  # every webhook that wants it has its delivery
    UniqueConstraint("run_id", "seq"),
    Index("uq_outbox_terminal", "run_id", unique=True,
          sqlite_where=text("terminal"), postgresql_where=text("terminal")),
    Index("ix_outbox_unstamped", "id",
          sqlite_where=text("pub_seq IS NULL AND NOT internal"),
          postgresql_where=text("pub_seq IS NULL AND NOT internal")),
    Index("ix_outbox_unpublished", "pub_seq",
          sqlite_where=text("pub_seq IS NOT NULL AND NOT published"),
          postgresql_where=text("pub_seq IS NOT NULL AND NOT published")),
    Index("ix_outbox_unfanned", "id", sqlite_where=text(UNFANNED), postgresql_where=text(UNFANNED)),
)  # fmt: skip

relay_state = Table(
    "relay_state", metadata,
    Column("one", Integer, primary_key=True, autoincrement=False),
    Column("owner", Text),
    Column("lease_until", Instant),
    Column("last_stamp", BigInteger, nullable=False),
    Column("bus_identity", Text),
    Column("owed", Text, nullable=False),  # JSON: by consumer group, numbers trimmed before they were acknowledged
    CheckConstraint("one = 1", name="one_row"),
)  # fmt: skip

worker = Table(
    "worker", metadata,
    Column("id", Text, primary_key=True),
    Column("host", Text, nullable=False),
    Column("site", Text, nullable=False),
    Column("capabilities", Text, nullable=False),
    Column("slots", Integer, nullable=False),
    Column("draining", Boolean, nullable=False, server_default=text("false")),  # it claims nothing more
    Column("measured_at", Instant, nullable=False),
)  # fmt: skip

webhook_endpoint = Table(
    "webhook_endpoint", metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, ForeignKey("tenant.name")),  # one of the two
    Column("service_id", Text, ForeignKey("service.id")),
    Column("url", Text, nullable=False),
    Column("types", Text, nullable=False),  # JSON list
    Column("enabled", Boolean, nullable=False),
    Column("disabled_reason", Text),
    Column("secret", Text, nullable=False),  # sealed
    Column("old_secret", Text),
    Column("old_secret_until", Instant),
    Column("created_at", Instant, nullable=False),
    Index("ix_webhook_endpoint_tenant", "tenant"),
    Index("ix_webhook_endpoint_service_id", "service_id"),
    CheckConstraint("(tenant IS NULL) <> (service_id IS NULL)", name="one_owner"),
)  # fmt: skip

# No foreign key to `outbox`: events may be purged by age. A claim only moves `next_at` to its lease's end, so what a
# dispatcher dropped is due again by itself.
webhook_delivery = Table(
    "webhook_delivery", metadata,
    Column("id", Text, primary_key=True),
    Column("endpoint_id", Text, ForeignKey("webhook_endpoint.id", ondelete="CASCADE"), nullable=False),
    Column("event_id", Text, nullable=False),
    Column("tenant", Text, nullable=False),  # the event's
    Column("type", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempt", Integer, nullable=False),  # made so far
    Column("tries", Integer, nullable=False),  # of them, since it was made or last replayed
    Column("fence", Integer, nullable=False),
    Column("next_at", Instant),  # of a pending one
    Column("status", Integer),  # of the last attempt
    Column("error", Text),
    Column("settled_at", Instant),  # delivered, or dead
    UniqueConstraint("endpoint_id", "event_id"),
    Index("ix_webhook_delivery_pending", "endpoint_id", "next_at", "id",
          sqlite_where=text(IS_PENDING), postgresql_where=text(IS_PENDING)),
    Index("ix_webhook_delivery_dead", "id", sqlite_where=text(IS_DEAD), postgresql_where=text(IS_DEAD)),
    Index("ix_webhook_delivery_settled", "settled_at",
          sqlite_where=text(IS_SETTLED), postgresql_where=text(IS_SETTLED)),
)  # fmt: skip

webhook_attempt = Table(
    "webhook_attempt", metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("delivery_id", Text, ForeignKey("webhook_delivery.id", ondelete="CASCADE"), nullable=False),
    Column("endpoint_id", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("at", Instant, nullable=False),
    Column("status", Integer),
    Column("error", Text),
    Column("next_at", Instant),
    Column("duration", Span, nullable=False),
    UniqueConstraint("delivery_id", "attempt"),
    Index("ix_webhook_attempt_endpoint_id_id", "endpoint_id", "id"),
)  # fmt: skip

site = Table(
    "site", metadata,
    Column("name", Text, primary_key=True),
    Column("last_seen_at", Instant, nullable=False),  # its reaper listed the world
    Column("asked_at", Instant),  # somebody wants it to look again
    Column("forgotten_at", Instant),  # by an operator; until it answers
)  # fmt: skip

# What each site's reaper discovered when it last looked. Without a foreign key to `run`: an orphan has none.
inventory = Table(
    "inventory", metadata,
    Column("site", Text, ForeignKey("site.name"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("variant", Text, nullable=False),
    Column("run", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("expires_at", Instant, nullable=False),
    Column("observed_at", Instant, nullable=False),
    Column("state", Text, nullable=False),
    Column("resisting_since", Instant),  # its destruction was begun then, and has not come off
    Column("standby", Text),  # of one that was made before anybody asked
)  # fmt: skip

cleanup = Table(
    "cleanup", metadata,
    Column("id", Text, primary_key=True),
    Column("asked_by", Text, nullable=False),
    Column("at", Instant, nullable=False),
    Column("force", Boolean, nullable=False),
    Column("applied_at", Instant),  # until then it is a dry run
    Column("done_at", Instant),
)  # fmt: skip

cleanup_action = Table(
    "cleanup_action", metadata,
    Column("cleanup_id", Text, ForeignKey("cleanup.id", ondelete="CASCADE"), primary_key=True),
    Column("n", Integer, primary_key=True, autoincrement=False),
    Column("ref", Text, nullable=False),  # JSON
    Column("site", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("why", Text, nullable=False),
    Column("ordered", Boolean, nullable=False),  # the plan is applied, and the line is for its site to execute
    Column("result", Text),
    Column("done_at", Instant),
    Index("ix_cleanup_action_ordered", "site", "cleanup_id", "n",
          sqlite_where=text(IS_ORDERED), postgresql_where=text(IS_ORDERED)),
)  # fmt: skip

# Written before the act it is about, and again with its result.
audit = Table(
    "audit", metadata,
    Column("id", Text, primary_key=True),  # UUIDv7: newest first is id descending
    Column("at", Instant, nullable=False),
    Column("who", Text, nullable=False),
    Column("what", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("detail", Text, nullable=False),  # JSON
    Column("result", Text),  # JSON text; none: the act goes on, or its end was not seen
)  # fmt: skip
