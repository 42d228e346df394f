"""The arithmetic made fast: one file an op."""
