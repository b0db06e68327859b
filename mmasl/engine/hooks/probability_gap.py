"""Log of the probability gap (Sec. 2.6 of arXiv 2009.14119)."""
import math
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor

from mmasl.errors import ConfigError
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.models.losses.utils import find_losses
from mmasl.registry import HOOKS


@HOOKS.register_module()
class ProbabilityGapHook(Hook):
    """Logs p_t+, p_t- and their gap (Eq. 9-10, Fig. 4) of every :class:`mmasl.AsymmetricLoss`, with gamma_neg and clip.

    The loss computes the sums of probabilities as a by-product. The hook adds the sums and counts of ranks, calls of
    the loss and accumulated batches, then divides, and logs averages over a running window. The log line, TensorBoard
    and scalars.json call them ``p_t_pos``, ``p_t_neg``, ``gap``, ``gamma_neg`` and ``clip``; with several losses in a
    model, their number follows (``gap_0``, ``gap_1``). ``loss_per_entry`` is the loss of an update divided by its
    labels that are not ignored, before ``loss_weight`` and the reduction, so that trainings of other batch sizes,
    reductions and numbers of classes can be compared.

    Args:
        window: Length of the window in updates, >= 1. Older updates fade by 1 - 1 / window with each new one, and by
            less if the window would hold fewer than about 100 positives.

    Raises:
        ConfigError: ``window`` is out of range, the model has no such loss, or a second hook reads its probabilities.
    """
    priority = 'ABOVE_NORMAL'  # before EMAHook and CheckpointHook
    min_positives = 100.

    def __init__(self, window: float = 5) -> None:
        if not window >= 1:
            raise ConfigError(f'window={window} must be at least 1 update')
        self.window = window
        self.losses: list[AsymmetricLoss] = []
        self.sums: list[Tensor] = []  # of each loss: p_t+, positives, p_t-, negatives
        self.entry_losses: dict[int, Tensor] = {}  # of each loss in the last update

    def before_train(self, runner: Runner) -> None:
        readers = [type(hook).__name__ for hook in runner.hooks if isinstance(hook, ProbabilityGapHook)]
        if len(readers) > 1:
            raise ConfigError(f'custom_hooks has {" and ".join(readers)}, and only one hook can read the '
                              'probabilities. Keep one; AdaptiveAsymmetryHook logs what ProbabilityGapHook does')
        self.losses = list(find_losses(runner.model).values())
        if not self.losses:
            raise ConfigError(f"{type(self).__name__} found no mmasl.AsymmetricLoss in the model: set the head's loss, "
                              "for example model.head.loss=dict(_delete_=True, type='mmasl.AsymmetricLoss'), or remove "
                              'the hook')
        for loss in self.losses:
            loss.probability_sums.enabled = True
        self.sums = [loss.gamma_neg.new_zeros(4) for loss in self.losses]

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if not self._has_updated(runner):
            return  # gradients and sums accumulate
        for number, (loss, sums) in enumerate(zip(self.losses, self.sums)):
            renewed = self._take(loss, sums, number)
            self.control(number, gap_of(sums), renewed, runner.iter / runner.max_iters)
            self._log(runner, number)

    def control(self, number: int, gap: Tensor, renewed: Tensor, done: float) -> None:
        """Called with the gap of a loss after each update; does nothing here.

        Args:
            number: Index of the loss in ``self.losses``.
            gap: Gap over the window, (). NaN before the first positive or negative.
            renewed: Share of the window that the update renewed, (), from 0 (no positive) to 1.
            done: Share of the training that is over, in [0, 1).
        """

    def after_train(self, runner: Runner) -> None:
        for loss in self.losses:
            loss.probability_sums.enabled = False

    @staticmethod
    def _has_updated(runner: Runner) -> bool:
        wrapper = runner.optim_wrapper
        # Several optimizers have no common count; DeepSpeed accumulates inside its engine.
        if isinstance(wrapper, OptimWrapperDict) or not hasattr(wrapper, 'should_update'):
            return True
        return wrapper.should_update()

    def _take(self, loss: AsymmetricLoss, sums: Tensor, number: int = 0) -> Tensor:
        """Move the loss's sums of this update into the window, in place; returns ``renewed`` of :meth:`control`."""
        # All ranks take part, also one whose loss was not called: YOLOX skips it for images without objects.
        batch, summed = sums.new_zeros(5), loss.probability_sums.loss
        if (total := loss.probability_sums.take()) is not None:
            batch[:4] += total.sum(-1)
        if summed is not None:
            batch[4] += summed
        all_reduce(batch)
        self.entry_losses[number] = batch[4] / (batch[1] + batch[3])
        batch = batch[:4]
        # The window is unchanged without positives, and at NaN, where the loss is NaN too and CheckFiniteHook stops.
        positives = torch.where(batch.isfinite().all(), batch[1], 0)
        fade = (-positives / self.min_positives).exp_().clamp_(min=1 - 1 / self.window)
        sums.copy_(torch.where(positives > 0, fade * sums + batch, sums))
        return (1 - fade) * self.window

    def _log(self, runner: Runner, number: int) -> None:
        loss, sums = self.losses[number], self.sums[number]
        figures = dict(p_t_pos=sums[0] / sums[1], p_t_neg=sums[2] / sums[3], gap=gap_of(sums))
        for name in ('gamma_neg', 'clip'):
            value = getattr(loss, name)
            figures[name] = value.mean()
            if value.dim():
                figures |= {f'{name}_min': value.min(), f'{name}_max': value.max()}
        figures['loss_per_entry'] = self.entry_losses[number]
        suffix = f'_{number}' if len(self.losses) > 1 else ''
        # One transfer for all figures; MMEngine has already waited for the device to log the loss.
        for name, value in zip(figures, torch.stack(list(figures.values())).tolist()):
            if math.isfinite(value):
                runner.message_hub.update_scalar(f'train/{name}{suffix}', value)


def gap_of(sums: Tensor) -> Tensor:
    """Probability gap (Eq. 10).

    Args:
        sums: Sum of p_t over positives, number of positives, and both for negatives, (4,).

    Returns:
        The gap, (); NaN without positives or negatives.
    """
    return sums[0] / sums[1] - sums[2] / sums[3]
