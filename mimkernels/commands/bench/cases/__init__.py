"""The cases that are timed, one module a group."""
