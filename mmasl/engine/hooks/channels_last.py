"""Stores a model's images and weights with the channels last, which convolutions on CPUs and tensor cores prefer."""
import torch
from mmengine import hooks
from mmengine.runner import Runner

from mmasl.registry import HOOKS


@HOOKS.register_module()
class ChannelsLastHook(hooks.Hook):
    """Converts the model to ``torch.channels_last`` before a training, validation or test.

    Convolutions return their result in the layout of their weights, so the images need no conversion. The results are
    those of the default layout up to rounding, and so are the checkpoints.
    """

    def before_run(self, runner: Runner) -> None:
        runner.model.to(memory_format=torch.channels_last)
