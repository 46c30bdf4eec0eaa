"""Tests that are known to fail, with the reason: reported as expected failures until what they show is repaired.

A key is a test's node id, or the start of several.
"""

KNOWN_FAILURES: dict[str, str] = {}
