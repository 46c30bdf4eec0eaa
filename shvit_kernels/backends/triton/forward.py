"""Attention over the first P channels, the others copied: ``shsa_forward`` and ``shsa_eval``."""

OPERATORS = {}
