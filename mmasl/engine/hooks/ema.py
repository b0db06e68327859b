"""TODO."""
from typing import Any

from mmengine import hooks
from mmengine.runner import BaseLoop, Runner

from mmasl.registry import HOOKS


@HOOKS.register_module()
class EMAHook(hooks.EMAHook):
    """MMEngine's EMAHook with a horizon in the run's own length.

    A fixed decay averages over a fixed number of steps: the 0.9997 of the official train.py, made for COCO, still holds
    61 % of the initial weights after its 41 epochs on VOC. Here the decay d follows from the number of steps n of the
    training, so that the mean age of the averaged weights, d / (1 - d), is ``horizon`` n; of the initial weights
    about exp(-1 / horizon) is left at the end. As with MMEngine's hook, the average is evaluated, it is what
    ``state_dict`` of a checkpoint holds, and training resumes from the weights beside it.

    Args:
        horizon: Mean age of the averaged weights, as a share of the training, in (0, 1).
        **kwargs: As in :class:`mmengine.hooks.EMAHook`, but for ``momentum``. ``update_buffers=True`` averages the
            statistics of batch norm too, as the official code does, instead of taking the latest. What is no part of
            the state dict, such as gamma_neg of :class:`mmasl.AsymmetricLoss`, is not averaged and stays the latest,
            where MMEngine's hook evaluates with that of the start.

    Raises:
        ValueError: ``horizon`` is out of its range, or ``momentum`` is given too.
    """

    def __init__(self, horizon: float, **kwargs: Any) -> None:
        if not 0 < horizon < 1:
            raise ValueError(f'horizon={horizon} must be a share of the training, between 0 and 1')
        if 'momentum' in kwargs:
            raise ValueError(f'momentum={kwargs["momentum"]}: here it follows from the horizon; for a fixed one take '
                             "type='EMAHook'")
        super().__init__(**kwargs)
        self.horizon = horizon

    def before_run(self, runner: Runner) -> None:
        # runner.max_iters would build the training's data for a test.
        if isinstance(runner._train_loop, BaseLoop):
            self.ema_cfg['momentum'] = 1 / (1 + self.horizon * runner._train_loop.max_iters)  # 1 - d
        super().before_run(runner)

    def _swap_ema_parameters(self) -> None:
        if self.ema_model.update_buffers:
            # What is averaged is the state dict; MMEngine swaps all buffers.
            average, latest = self.ema_model.module.state_dict(), self.src_model.state_dict()
            for name, value in average.items():
                kept = value.clone()
                value.copy_(latest[name])
                latest[name].copy_(kept)
        else:
            super()._swap_ema_parameters()
