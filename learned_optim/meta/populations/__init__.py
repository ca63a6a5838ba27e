"""Tasks for many copies of a network at once, for evolution on whole runs."""
