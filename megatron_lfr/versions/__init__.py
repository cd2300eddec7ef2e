"""Versions of a model: runs that branch off from another one, and runs that are extended."""
