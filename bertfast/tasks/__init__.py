"""What a trained model is for: one callable per task."""

from bertfast.tasks.fill_mask import Filled, FillMask

__all__ = ["FillMask", "Filled"]
