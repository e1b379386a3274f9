"""Endurance experiments of the trainer: whole runs in processes of their own, killed, cut off, starved and compared.

`python scripts/soak.py` runs all of them; `tests/train/test_distributed.py` runs short forms.
"""
