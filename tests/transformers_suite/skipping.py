"""What tells apart, in the summary, the tests that ran, those that looked at nothing and those that were skipped."""

import unittest

OURS = "ours: "
"""Begins the reasons that are not transformers' own."""
MODELS_BUILT = "models_built"
"""The property of a test that says how many models it built."""


def skips(reasons):
    """Skips the tests named, each for the reason given."""

    def mark(cls):
        for name, reason in reasons.items():
            setattr(cls, name, unittest.skip(OURS + reason)(getattr(cls, name)))
        return cls

    return mark
