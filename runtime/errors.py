"""Everything that Anamorph raises on purpose.

    AnamorphError
    |-- CheckpointError      a folder or file of a checkpoint is missing, damaged or does not fit the model
    |-- ConfigError          a configuration holds a key or a value that the class does not know
    |-- InputError           an argument of a call is out of range or does not fit the others (also a ValueError)
    |-- BackendError         an engine cannot do what was asked
    |   `-- BackendUnavailable   the engine is not installed, or not on this machine
    |-- ArtifactError        an exported folder is incomplete, foreign, or called outside its interface
    |-- NumericalError       a component returned NaN or infinity
    `-- OutputError          a result could not be written

Every message says what happened, what was expected and what to do.
"""


class AnamorphError(Exception):
    """Base class of all errors raised on purpose."""


class CheckpointError(AnamorphError):
    """A folder or file of a checkpoint is missing, damaged or does not fit the model."""


class ConfigError(AnamorphError):
    """A configuration holds a key or a value that the class does not know."""


class InputError(AnamorphError, ValueError):
    """An argument of a call is out of range or does not fit the others."""


class BackendError(AnamorphError):
    """An engine cannot do what was asked."""


class BackendUnavailable(BackendError):
    """The engine is not installed, or does not exist on this machine."""


class ArtifactError(AnamorphError):
    """An exported folder is incomplete, foreign, or called outside its interface."""


class NumericalError(AnamorphError):
    """A component returned NaN or infinity."""


class OutputError(AnamorphError):
    """A result could not be written."""
