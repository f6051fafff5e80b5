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

from service.adapters.sql.engine import Instant

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
    Column("boundary", Text, nullable=False),
    Column("runtime", Text, nullable=False),
    Column("phase", Text, nullable=False),
    Column("outcome", Text),
    Column("reason", Text),
    Column("attempt", Integer, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("destroyed_fence", Integer, nullable=False),  # the highest fence whose boundary is known to be gone
    Column("last_seq", Integer, nullable=False),  # of its events
    Column("lease_owner", Text),
    Column("lease_until", Instant),  # set in the active phases only
    Column("site", Text),  # where its latest boundary is, or was
    Column("cancel_requested_by", Text),
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
    Index("ix_run_claimable", "tenant", "boundary", "runtime", "id",
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
# summed without looking at the rows.
run_blob = Table(
    "run_blob", metadata,
    Column("run_id", Text, ForeignKey("run.id", ondelete="CASCADE"), primary_key=True),
    Column("digest", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Index("ix_run_blob_tenant_digest_bytes", "tenant", "digest", "bytes"),
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
    UniqueConstraint("run_id", "seq"),
    Index("uq_outbox_terminal", "run_id", unique=True,
          sqlite_where=text("terminal"), postgresql_where=text("terminal")),
    Index("ix_outbox_unstamped", "id",
          sqlite_where=text("pub_seq IS NULL AND NOT internal"),
          postgresql_where=text("pub_seq IS NULL AND NOT internal")),
    Index("ix_outbox_unpublished", "pub_seq",
          sqlite_where=text("pub_seq IS NOT NULL AND NOT published"),
          postgresql_where=text("pub_seq IS NOT NULL AND NOT published")),
)  # fmt: skip

relay_state = Table(
    "relay_state", metadata,
    Column("one", Integer, primary_key=True, autoincrement=False),
    Column("owner", Text),
    Column("lease_until", Instant),
    Column("last_stamp", BigInteger, nullable=False),
    Column("bus_identity", Text),
    CheckConstraint("one = 1", name="one_row"),
)  # fmt: skip

worker = Table(
    "worker", metadata,
    Column("id", Text, primary_key=True),
    Column("host", Text, nullable=False),
    Column("site", Text, nullable=False),
    Column("capabilities", Text, nullable=False),
    Column("measured_at", Instant, nullable=False),
)  # fmt: skip
