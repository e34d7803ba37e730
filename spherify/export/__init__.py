"""Writing converted models to disk and reading them back."""
