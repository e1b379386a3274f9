"""The loader: against others, at a start on many files, over many epochs."""
