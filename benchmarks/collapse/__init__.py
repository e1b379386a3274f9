"""Planted collapses of tiny recipes on a CPU, and what each monitor says of them."""
