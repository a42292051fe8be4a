"""The proofs of the promise: each a module that runs alone (`python -m tests.torture.NAME`), long or short."""
