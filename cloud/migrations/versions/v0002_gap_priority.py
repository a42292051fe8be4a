"""A gap's priority, and how many of its range are gone where others stand between.

On MySQL each column is added by itself and only where it is not there: a crash between the two is gone over again.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    there = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("gaps")}
    for column in (
        sa.Column("priority", sa.String(16), nullable=False, server_default=""),
        sa.Column("frames", sa.BigInteger(), nullable=False, server_default="0"),
    ):
        if column.name not in there:
            op.add_column("gaps", column)
