"""Encoded bytes to samples: what a file of a stranger goes through first."""
