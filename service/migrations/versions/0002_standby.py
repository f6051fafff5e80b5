"""Of each boundary that stands: whether it was made before anybody asked, and what has become of it."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("inventory", sa.Column("standby", sa.Text(), nullable=True))
