"""Average of the weights with a horizon relative to the length of the training."""
from typing import Any

from mmengine import hooks
from mmengine.runner import Runner

from mmasl.errors import ConfigError
from mmasl.registry import HOOKS
from mmasl.utils.runner import built_loop


@HOOKS.register_module()
class RelativeEMAHook(hooks.EMAHook):
    """MMEngine's EMAHook whose decay follows from the length of the training.

    A fixed decay averages over a fixed number of steps: the official 0.9997, chosen for COCO, still holds 61 % of the
    initial weights after 41 epochs of VOC. Here the mean age of the averaged weights, d / (1 - d) steps for a decay d,
    is ``horizon`` times the number of steps of the training; about exp(-1 / horizon) of the initial weights remains at
    the end. As with MMEngine's hook, the average is evaluated and saved in ``state_dict``, and training resumes from
    the raw weights beside it.

    Args:
        horizon: Mean age of the averaged weights, as a share of the training, in (0, 1).
        **kwargs: As in :class:`mmengine.hooks.EMAHook`, except ``momentum``. ``update_buffers=True`` averages the
            statistics of batch norm too, as the official code does, instead of using the latest. Buffers outside of
            the state dict, such as gamma_neg of :class:`mmasl.AsymmetricLoss`, are not averaged: the latest values are
            used, where MMEngine's hook evaluates with the initial ones.

    Raises:
        ConfigError: ``horizon`` is out of range, or ``momentum`` is given.
    """

    def __init__(self, horizon: float, **kwargs: Any) -> None:
        if not 0 < horizon < 1:
            raise ConfigError(f'horizon={horizon} must be a share of the training, between 0 and 1')
        if 'momentum' in kwargs:
            raise ConfigError(f'momentum={kwargs["momentum"]}: RelativeEMAHook derives it from the horizon. For a '
                              "fixed momentum, use type='EMAHook'")
        super().__init__(**kwargs)
        self.horizon = horizon

    def before_run(self, runner: Runner) -> None:
        # runner.max_iters would build the training data for a test.
        if loop := built_loop(runner, 'train'):
            self.ema_cfg['momentum'] = 1 / (1 + self.horizon * loop.max_iters)  # 1 - d
        super().before_run(runner)

    def _swap_ema_parameters(self) -> None:
        if self.ema_model.update_buffers:
            # The state dict is averaged; MMEngine would swap all buffers.
            average, latest = self.ema_model.module.state_dict(), self.src_model.state_dict()
            for name, value in average.items():
                kept = value.clone()
                value.copy_(latest[name])
                latest[name].copy_(kept)
        else:
            super()._swap_ema_parameters()
