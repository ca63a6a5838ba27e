"""The figures of README and the documentation, each made by a command."""
