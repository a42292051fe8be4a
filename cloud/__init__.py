"""The cloud: doors, intake, journal, sinks, and the operator's API."""
