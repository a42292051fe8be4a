"""Configuration as typed structures, loaded from TOML with errors that say where and what to do."""
