"""TODO."""
import math
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn

from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.registry import HOOKS


def find_losses(model: nn.Module) -> list[AsymmetricLoss]:
    """The asymmetric losses of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, AsymmetricLoss)]


@HOOKS.register_module()
class ProbabilityGapHook(Hook):
    """Logs p_t+, p_t- and their gap (Eq. 9-10, Fig. 4) of every :class:`AsymmetricLoss`, beside its gamma_neg and clip.

    Over label entries of the global batch: ranks, calls of the loss and accumulated batches add up their sums and
    counts, and only then is divided. The figures are those of a running window. They are called ``p_t_pos``,
    ``p_t_neg``, ``gap``, ``gamma_neg`` and ``clip`` in the log line, in TensorBoard and in scalars.json, with the
    number of the loss behind (``gap_0``, ``gap_1``) in a model with several.

    Args:
        window: Length of the window in updates, >= 1. Older updates fade by 1 - 1 / window with each new one.
        min_positives: The window grows longer until it holds about as many positives, > 0.

    Raises:
        ValueError: An argument is out of range, the model has no such loss, or a second hook reads its probabilities.
    """
    priority = 'ABOVE_NORMAL'  # before EMAHook and CheckpointHook

    def __init__(self, window: float = 5, min_positives: float = 100) -> None:
        if not window >= 1:
            raise ValueError(f'window={window} must be at least 1 update')
        if not min_positives > 0:
            raise ValueError(f'min_positives={min_positives} must be above 0')
        self.window = window
        self.min_positives = min_positives
        self.losses: list[AsymmetricLoss] = []
        self.sums: list[Tensor] = []
        self.per_class = False

    def before_train(self, runner: Runner) -> None:
        readers = [type(hook).__name__ for hook in runner.hooks if isinstance(hook, ProbabilityGapHook)]
        if len(readers) > 1:
            raise ValueError(f'custom_hooks holds {" and ".join(readers)}, and the first would leave the second '
                             'nothing to read, nor to steer by: keep one of them. AdaptiveAsymmetryHook logs what '
                             'ProbabilityGapHook does')
        self.losses = find_losses(runner.model)
        if not self.losses:
            raise ValueError(f"{type(self).__name__} found no mmasl.AsymmetricLoss in the model: set the head's loss, "
                             "as in model.head.loss=dict(_delete_=True, type='mmasl.AsymmetricLoss'), or remove the "
                             'hook')
        for loss in self.losses:
            loss.probability_sums.enabled = True
        shapes = [torch.broadcast_shapes(loss.gamma_neg.shape, loss.clip.shape) if self.per_class else ()
                  for loss in self.losses]
        self.sums = [loss.gamma_neg.new_zeros(4, *shape) for loss, shape in zip(self.losses, shapes)]

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if not self._has_updated(runner):
            return  # gradients are being accumulated, and so are the sums
        for number, (loss, sums) in enumerate(zip(self.losses, self.sums)):
            renewed = self._take(loss, sums)
            self.control(number, gap_of(sums), renewed, runner.iter / runner.max_iters)
            self._log(runner, number)

    def control(self, number: int, gap: Tensor, renewed: Tensor, done: float) -> None:
        """What is done with the gap of a loss after an update: nothing here.

        Args:
            number: Of the loss, in ``self.losses``.
            gap: Gap over the window, () or (C,) per class; NaN before the first positive or negative.
            renewed: How much of the window the update renewed for a class, from 0, without a positive, to 1; likewise.
            done: Share of the training that is over, in [0, 1).
        """

    def after_train(self, runner: Runner) -> None:
        for loss in self.losses:
            loss.probability_sums.enabled = False

    @staticmethod
    def _has_updated(runner: Runner) -> bool:
        wrapper = runner.optim_wrapper
        # Several optimizers have no common count, DeepSpeed's accumulates inside its engine.
        if isinstance(wrapper, OptimWrapperDict) or not hasattr(wrapper, 'should_update'):
            return True
        return wrapper.should_update()

    def _take(self, loss: AsymmetricLoss, sums: Tensor) -> Tensor:
        """Move the loss's sums of this update into the window, in place; returns ``renewed`` of :meth:`control`."""
        # All ranks add up, also one whose loss was not called: YOLOX does not call it without objects.
        batch = torch.zeros_like(sums)
        taken = loss.probability_sums.take()
        if taken is not None:
            batch += taken if self.per_class else taken.sum(-1)
        all_reduce(batch)
        # Without positives the window holds still. So it does at NaN: the loss is NaN as well, which others report.
        positives = torch.where(batch.isfinite().all(0), batch[1], 0)
        fade = (-positives / self.min_positives).exp_().clamp_(min=1 - 1 / self.window)
        sums.copy_(torch.where(positives > 0, fade * sums + batch, sums))
        return (1 - fade) * self.window

    def _log(self, runner: Runner, number: int) -> None:
        loss, sums = self.losses[number], self.sums[number]
        total = sums.reshape(4, -1).sum(1)
        figures = dict(p_t_pos=total[0] / total[1], p_t_neg=total[2] / total[3], gap=gap_of(total))
        for name in ('gamma_neg', 'clip'):
            value = getattr(loss, name)
            figures[name] = value.mean()
            if value.dim():
                figures |= {f'{name}_min': value.min(), f'{name}_max': value.max()}
        suffix = f'_{number}' if len(self.losses) > 1 else ''
        # One transfer for all; MMEngine has waited for the device to log the loss before.
        for name, value in zip(figures, torch.stack(list(figures.values())).tolist()):
            if math.isfinite(value):
                runner.message_hub.update_scalar(f'train/{name}{suffix}', value)


def _is_to_start(runner: Runner) -> bool:
    """Whether a training is to start, which takes the config's asymmetry; a test takes the checkpoint's."""
    # In a test runner.iter would build the training's data.
    return isinstance(runner._train_loop, BaseLoop) and runner.iter == 0


def gap_of(sums: Tensor) -> Tensor:
    """Probability gap (Eq. 10) from the four sums in the first dimension; NaN without positives or negatives."""
    return sums[0] / sums[1] - sums[2] / sums[3]
