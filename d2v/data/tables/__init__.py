"""Samples and what is known of them in tables: files beside the samples of a folder, and parquet."""
