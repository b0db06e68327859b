"""Search for losses in a model."""
from torch import nn

from mmasl.models.losses.asymmetric_loss import AsymmetricLoss


def find_losses(model: nn.Module) -> dict[str, AsymmetricLoss]:
    """The asymmetric losses of a model by the names of their modules, in the order of the modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AsymmetricLoss)}
