"""Settings of all tests."""

from hypothesis import settings

# The same examples on every run: a failure is a change of the code, never of the dice.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
