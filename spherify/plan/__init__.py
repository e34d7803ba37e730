"""Deciding: which layers are converted, which are kept, by which rule, and why."""
