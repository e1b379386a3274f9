"""Datasets and loaders. Every random choice about a sample is a function of (seed, epoch, sample id)."""
