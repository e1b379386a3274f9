"""Pictures, dry runs and the quick start's images."""
