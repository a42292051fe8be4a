"""Real servers for tests, demo and benchmarks: where each comes from, how it is started and killed."""
