"""The durable log between intake and the sinks."""
