"""Errors that a user can cause: each says what was wrong, where, and what to do about it."""


class UserError(Exception):
    """Base of all errors whose message is meant for the user; shown without a traceback by the CLI."""


class ConfigError(UserError):
    """A setting, hyperparameter or environment variable has an unusable value."""


class ScaleError(ConfigError):
    """A Ray scale is invalid, unknown or declared twice."""


class DataError(UserError):
    """A data source is missing, incomplete or not what it claims to be."""


class PreflightError(UserError):
    """The cluster or the disk cannot hold what is asked of it; nothing was started."""


class CorruptionError(UserError):
    """A stored file does not match its checksum, or a stored directory is incomplete."""


class FormatError(UserError):
    """What is stored is as it was written, but in a format that this version of the program does not read."""


class DiskFullError(UserError):
    """A disk stayed full for longer than the training could wait; what it had written before is kept."""


class TrainingFailedError(UserError):
    """A training ended without a result; the message carries the cause that its driver reported."""


class UpscalingFailedError(UserError):
    """A video could not be upscaled; the message carries the cause. What was done is kept, and the next call goes on."""


class LeaseLostError(UserError):
    """Another job has taken over the training; this one must not write any more."""
