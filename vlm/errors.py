"""The project's own errors: each message is one sentence with the value, the place and the mend."""


class VlmError(Exception):
    """Anything a user can mend. The command line prints its message without a traceback."""


class ConfigError(VlmError):
    """A configuration that cannot be: a wrong field, type, size or combination."""


class DataError(VlmError):
    """Data that is missing, unreadable, or not what its description says."""


class CheckpointError(VlmError):
    """A run, bundle or public checkpoint that is missing, torn, or of another architecture."""


class ShardingError(VlmError):
    """A mesh or a batch that does not fit the devices."""


class TrainingError(VlmError):
    """A training run that had to stop, such as a loss that is no longer finite."""


def first_line(error: Exception) -> str:
    """What an error of another library says first, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
