"""The command line. No logic: it reads options, calls the public functions, prints. torch is imported in commands."""
