"""What can go wrong through no fault of the program; the message is for whoever can put it right.

    FlaxmillError
    ├── ConfigError       a model configuration that is wrong or not implemented
    ├── TokenizerError    text that cannot be encoded, ids that cannot be decoded, unreadable tokenizer files
    ├── CheckpointError   a model folder that is missing, incomplete, damaged or in the way
    ├── SamplingError     sampling parameters that cannot be
    ├── RequestError      a prompt that cannot be served; has a stable `code`
    ├── EngineError       an engine that cannot be: its slots take more memory than there is
    └── NativeError       native kernels that are required and cannot be had, or are used for what they cannot do

The other packages add their own kinds. A command line turns every FlaxmillError into one line and exit code 1.
"""


class FlaxmillError(Exception):
    """The world is not as it must be; says what was found, what was expected and what to do next."""


class ConfigError(FlaxmillError, ValueError):
    """A model configuration that is wrong, or that says something we do not implement."""


class TokenizerError(FlaxmillError, ValueError):
    """Text that cannot be encoded, ids that cannot be decoded, or tokenizer files that cannot be read."""


class CheckpointError(FlaxmillError):
    """A model folder that is missing, incomplete, damaged, or not what its configuration says."""


class SamplingError(FlaxmillError, ValueError):
    """Sampling parameters that cannot be."""


class RequestError(FlaxmillError, ValueError):
    """A request that cannot be served; `code` is stable, the message is for people."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class EngineError(FlaxmillError):
    """An engine that cannot be; says what it would take."""


class NativeError(FlaxmillError):
    """Native kernels that are required and cannot be had, or that are used for what they cannot do."""
