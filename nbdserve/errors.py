"""The exceptions of nbdserve, split by consequence.

What matters to a caller is what happens next, so the tree has one branch for
each consequence:

    NbdserveError
    ├── ConfigError          the operator asked for something impossible
    ├── ProtocolError        a peer broke the protocol: its connection ends
    ├── RequestError         one request fails with an errno, nothing else
    └── ImageError           an image can't be used, or not any longer
        ├── ImageFormatError     not such an image, or a feature we don't know
        │   └── ForeignFormatError   an image of a format that nbdserve does not read
        ├── ImageCorruptError    its metadata contradict themselves
        ├── ImageLockedError     it is encrypted, and no passphrase opens it
        ├── ImageInUseError      another process has it open
        ├── BackingFileError     its backing file is missing or not allowed
        └── DataFileError        its external data file is missing or not allowed

Each message is one line that names the thing, says what is wrong and, where
there is something to do about it, what. A system call's own `OSError` passes
through the engine unchanged: its errno is the answer to the request.
"""

import os


def explain(error: BaseException) -> str:
    """Return one line for an error that a person can do something about."""
    if isinstance(error, OSError) and error.strerror:
        name = ""
        if error.filename is not None:
            name = os.fsdecode(error.filename) or "''"
        text = f"{name}: {error.strerror}" if name else error.strerror
    else:
        text = str(error)
    return " ".join(text.split())


class NbdserveError(Exception):
    """Any error that nbdserve raises on purpose."""


class ConfigError(NbdserveError):
    """The operator asked for something impossible: a wrong option, a busy port."""


class ProtocolError(NbdserveError):
    """A peer broke the protocol so that its connection can't go on."""


class RequestError(NbdserveError):
    """One request fails; the connection and the image go on.

    Attributes:
        errno: The number from `errno` that says why.
    """

    def __init__(self, errno: int, message: str) -> None:
        """Keep `errno` beside the text."""
        super().__init__(message)
        self.errno = errno


class ImageError(NbdserveError):
    """An image can't be used, or not any longer."""


class ImageFormatError(ImageError):
    """A file is not an image of that format, or uses a feature we don't know."""


class ForeignFormatError(ImageFormatError):
    """A file looks like an image of a format that nbdserve does not read."""


class ImageCorruptError(ImageError):
    """An image's metadata contradict themselves or the specification."""


class ImageLockedError(ImageError):
    """An image is encrypted, and no passphrase at hand opens it."""


class ImageInUseError(ImageError):
    """Another process has the image open in a way that excludes ours."""


class BackingFileError(ImageError):
    """A backing file is missing, not allowed, or part of a loop."""


class DataFileError(ImageError):
    """An external data file is missing, not allowed, or a file used otherwise."""
