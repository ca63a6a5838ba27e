"""Measurements that take minutes to hours; each module says what it measures and how to run it."""
