"""Keeping what the donor knows: statistics, closed-form transplantation, reconstruction, annealing."""
