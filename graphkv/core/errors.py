"""The exceptions of graphkv, each also the builtin that a caller would expect, and its warning."""

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BackendError",
    "BackendUnavailableError",
    "GraphKVError",
    "GraphKVWarning",
]


class GraphKVError(Exception):
    """Base class of every exception that graphkv raises on purpose."""


class ArgumentError(GraphKVError, ValueError):
    """An argument has a shape or a value that the call does not allow."""


class ArgumentTypeError(GraphKVError, TypeError):
    """An argument has a type or a dtype that the call does not allow."""


class BackendError(GraphKVError, TypeError):
    """Arrays of unknown or of different libraries, or an unknown backend."""


class BackendUnavailableError(GraphKVError, ImportError):
    """A backend was asked for whose library is not installed or finds no device."""


class GraphKVWarning(UserWarning):
    """Something works, but hardly as it was meant."""
