"""Every error a user can cause, one type per part of the system.

A message names the offending value and says what to do about it; the command line prints it as one line.
"""


class RotexportError(Exception):
    """Base of all errors that rotexport raises on purpose."""


class CheckpointError(RotexportError):
    """A model file or directory is missing, truncated, corrupt or incomplete."""


class RecipeError(RotexportError):
    """A recipe has an unknown key, an illegal value or asks for something impossible."""


class UnsupportedModelError(RotexportError):
    """The architecture holds a piece that export or analysis cannot treat."""


class TransformError(RotexportError):
    """A transform does not exist for the asked size, or does not fit its tensor."""


class GraphError(RotexportError):
    """A graph breaks an invariant that a pass relies on."""


class TargetError(RotexportError):
    """A target cannot run what the recipe asks, or its builder failed."""


class OutputError(RotexportError):
    """The output directory cannot be written, or already exists."""


class ValidationError(RotexportError):
    """A build, or a pass in it, strays from the reference further than its threshold."""
