"""The SQL stores' schema, version by version (Alembic; run when a sink opens)."""
