"""The exceptions bertfast raises besides ``ValueError`` and ``TypeError``."""


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here, or not on these inputs."""


class CheckpointError(ValueError):
    """A file or directory of weights is missing, damaged, or does not fit the model."""


class KernelError(RuntimeError):
    """A native kernel refused a launch; the message carries the kernel's name and its numbers."""
