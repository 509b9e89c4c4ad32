"""The fixtures of test_tamt.py, for the tests in this folder."""

from test_tamt import (  # noqa: F401
    corrupted,
    fixed_seed,
    imp_folder,
    layers,
    local_scores,
    masks,
    model,
    small,
    super_ticket,
    tasks,
    two_masks,
    two_super_tickets,
    vocabulary,
    world,
)
