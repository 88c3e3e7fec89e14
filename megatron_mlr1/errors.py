"""The errors of this package, one class for each person who can mend one.

A message has three parts: what is, what must be, what to do. Programs print the message alone and
exit with `exit_code`; a traceback means that the mistake is ours.
"""


class Mlr1Error(Exception):
    """Base of all errors that somebody outside this package can mend."""

    exit_code = 2


class ConfigError(Mlr1Error):
    """A flag, a recipe or a combination of them; mended on the command line."""


class DataError(Mlr1Error):
    """A corpus, a record or a tokenizer; mended by whoever prepares data."""


class CheckpointError(Mlr1Error):
    """A checkpoint, a Hugging Face folder or a weight; mended where it was written."""


class MachineError(Mlr1Error):
    """A driver, a device or a missing package; mended by whoever runs the machine."""


class TeacherError(Mlr1Error):
    """A teacher, its pool or its wire; mended by whoever serves the teacher."""
