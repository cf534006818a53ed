"""How a process that is the command's own imports torch."""

import gc
import sys


def load_torch() -> None:
    """Import torch with the garbage collector off, and keep what is there then out of its sight.

    Importing makes hundreds of thousands of objects, none of them garbage. The collector would walk
    them again and again while they come, while the model is read, and at the end. Where torch is
    imported already, the process is somebody else's, and nothing is done.
    """
    if "torch" in sys.modules:
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401

        gc.freeze()
    finally:
        if enabled:
            gc.enable()
