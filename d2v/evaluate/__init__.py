"""Frozen features and their probes."""
