"""The fixtures of test_tamt.py, for the tests in this folder."""

from test_tamt import corrupted, fixed_seed, layers, masks, model, tasks, vocabulary, world  # noqa: F401
