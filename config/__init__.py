"""Configuration: typed, loaded from TOML, with errors that say where and what to write instead."""
