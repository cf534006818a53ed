"""The exceptions bertfast raises besides ``ValueError`` and ``TypeError``."""


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here, or not on these inputs."""


class CheckpointError(ValueError):
    """A file or directory of weights is missing, damaged, or does not fit the model."""


class KernelError(RuntimeError):
    """A native kernel refused a launch; the message carries the kernel's name and its numbers."""


class InputError(ValueError):
    """One of several inputs cannot be used.

    Attributes:
        index: which one, from 0.
        reason: what is wrong with it.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"input {index}: {reason}")
        self.index = index
        self.reason = reason
