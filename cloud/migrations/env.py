"""Runs the migrations on the connection that the sink hands over; there is no alembic.ini."""

from alembic import context

from cloud.registry import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    transactional_ddl=connection.dialect.name == "sqlite",
    version_table="schema_version",
)
with context.begin_transaction():
    context.run_migrations()
