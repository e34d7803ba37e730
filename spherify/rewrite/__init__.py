"""Carrying a plan out on the module tree, by object identity; checking it; taking it back."""
