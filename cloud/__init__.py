"""The receiving side: doors, intake, the durable journal, and the sinks that empty it into databases."""
