"""Errors a user can act on. Each message is one sentence that names the thing and says what to do."""


class SparsifyError(Exception):
    """Base of every error that the command line prints without a traceback."""


class RecipeError(SparsifyError):
    """A recipe that cannot be read or asks for the impossible."""


class CheckpointError(SparsifyError):
    """A checkpoint that is missing, damaged, truncated, hostile, or cannot be written."""


class CalibrationError(SparsifyError):
    """Calibration text that is missing, unreadable or too short."""


class NumericalError(SparsifyError):
    """NaN, Inf or a matrix that cannot be factored, with the block and linear where it was seen."""


class MissingDependency(SparsifyError):
    """A package that this command needs and how to install it."""
