"""Benchmarks that a user can run on any model: what this machine gives, and how much of it is reached."""
