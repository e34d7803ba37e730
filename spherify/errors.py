"""The errors a user can meet: one line each, saying what, where, and what to do."""


class SpherifyError(Exception):
    """Something could not be done. The message is one line and names the remedy."""


class OptionError(SpherifyError, ValueError):
    """The call itself is wrong: an unknown name, a value out of range, options that exclude each other."""


class ModelError(SpherifyError, TypeError):
    """The model given cannot be converted in the form in which it was given."""


class RewriteError(SpherifyError):
    """The conversion was carried out but does not hold what its plan said."""


class FileError(SpherifyError):
    """A file or folder is missing, damaged, or belongs to something else."""
