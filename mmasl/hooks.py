"""Hooks that watch the probabilities of positives and negatives while training, and steer the asymmetry by them
(Sec. 2.6 and 2.7 of arXiv 2009.14119).

What they read, :attr:`AsymmetricLoss.probability_sums`, falls out of the loss; nothing is computed twice.
"""
import math
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn

from .losses import AsymmetricLoss
from .registry import HOOKS

STATE = 'adaptive_asymmetry'  # of the checkpoint
# A step of the margin for a step of 1 of gamma_neg that moves the gap about as far.
CLIP_PER_GAMMA = 0.05
SPEED = 800  # steps of all updates of a training together
HIGHEST_STEP = 0.6  # with much larger ones the control is quicker than the model answers, and oscillates
ERROR_LIMIT = 0.5  # what a larger distance from the target counts as


def find_losses(model: nn.Module) -> list[AsymmetricLoss]:
    """The asymmetric losses of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, AsymmetricLoss)]


def restore_asymmetry(model: nn.Module, checkpoint: dict) -> bool:
    """Set the losses of a model to the gamma_neg and clip that a training with :class:`AdaptiveAsymmetryHook` ended
    with.

    Needed where those values matter after training: for calibrated probabilities.

    Args:
        model: The model of the training.
        checkpoint: What ``torch.load`` gives for its checkpoint.

    Returns:
        Whether the checkpoint is of such a training; without, the losses are as the config has them.

    Raises:
        ValueError: The checkpoint holds another number of losses.
    """
    if STATE not in checkpoint:
        return False
    losses, states = find_losses(model), checkpoint[STATE]
    if len(losses) != len(states):
        raise ValueError(f'the checkpoint holds the asymmetry of {len(states)} losses and the model has {len(losses)}: '
                         'load it with the config that it was trained with')
    for loss, state in zip(losses, states):
        for name in ('gamma_neg', 'clip'):
            setattr(loss, name, state[name].to(getattr(loss, name)))
    return True


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
            loss.track_probabilities = True
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
            loss.track_probabilities = False

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
        if loss.probability_sums is not None:
            batch += loss.probability_sums if self.per_class else loss.probability_sums.sum(-1)
            loss.probability_sums = None
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


@HOOKS.register_module()
class AdaptiveAsymmetryHook(ProbabilityGapHook):
    """Steers the asymmetry of every :class:`AsymmetricLoss` to a wanted probability gap (Sec. 2.7, Eq. 11).

    After each update, within bounds,

        gamma_neg += step * (target - gap) - damping * (gap - gap before)

    The first term is Eq. 11 with the other sign: as printed there, ``gap - target``, it is positive feedback, since a
    larger gamma_neg raises the gap, and gamma_neg would run into a bound. The second damps: it stops gamma_neg from
    running ahead while the gap still moves, as in the first updates. The gap starts at 2 p - 1, whatever gamma_neg is,
    where p is the prior that the head's bias is set to. From p = 0.05 it rises; from p = 0.5, at which MMPretrain's
    heads start, it first falls, and ``begin`` has to outlast that.

    The paper gives no step. The right one depends on the length of the training: in Table 3, as in our runs, the gap
    rises by 0.06 to 0.08 per unit of gamma_neg, so that it comes to its target about like exp(-0.06 * step * updates).
    The default, 800 over the number of all updates, but at most 0.6, makes that a tenth of the training.

    The controlled values are in the checkpoint, beside the state dict. A resumed run goes on with them; one that only
    loads weights (``load_from``) starts from the config's.

    Args:
        target: Wanted gap, in (-1, 1). The paper tries 0 to 0.3 (Table 3).
        adapt: 'gamma_neg', 'clip', or both as a list; the margin then moves by 0.05 where gamma_neg would by 1.
        step: Change of gamma_neg per update and unit of gap, > 0 (lambda of Eq. 11); None: see above.
        damping: See above, >= 0; 0 is Eq. 11 alone.
        begin: Share of the training before control begins, in [0, 1).
        decay: Whether the step falls linearly to 0 at the end of the training.
        per_class: One value and one gap for each class, instead of one for all.
        num_classes: Number of classes, for ``per_class``; only needed where neither the loss nor its head tells.
        gamma_bounds: Lowest and highest gamma_neg.
        clip_bounds: Lowest and highest margin.
        window, min_positives: The window over which the gap is taken, see :class:`ProbabilityGapHook`. With
            ``per_class`` a class's step shrinks as its window grows, and a class without positives in an update holds.

    Raises:
        ValueError: An argument is out of range, the model has no asymmetric loss, a second hook reads its
            probabilities, or the checkpoint to resume from was written with another ``per_class``.

    Example:
        >>> custom_hooks = [dict(type='mmasl.AdaptiveAsymmetryHook', target=0.1)]
    """

    def __init__(self,
                 target: float = 0.1,
                 adapt: str | Sequence[str] = 'gamma_neg',
                 step: float | None = None,
                 damping: float = 3.,
                 begin: float = 0.02,
                 decay: bool = False,
                 per_class: bool = False,
                 num_classes: int | None = None,
                 gamma_bounds: tuple[float, float] = (0., 16.),
                 clip_bounds: tuple[float, float] = (0., 0.5),
                 window: float = 5,
                 min_positives: float = 100) -> None:
        super().__init__(window, min_positives)
        adapt = [adapt] if isinstance(adapt, str) else list(adapt)
        if not adapt or not set(adapt) <= {'gamma_neg', 'clip'}:
            raise ValueError(f"adapt={adapt} must name 'gamma_neg', 'clip' or both")
        if not -1 < target < 1:
            raise ValueError(f'target={target} must lie between -1 and 1, as the gap of two probabilities does')
        if step is not None and not step > 0:
            raise ValueError(f'step={step} must be above 0: a step below moves away from the target')
        if not damping >= 0:
            raise ValueError(f'damping={damping} must be 0 or above')
        if not 0 <= begin < 1:
            raise ValueError(f'begin={begin} must be a share of the training, in [0, 1)')
        for name, (low, high), end in (('gamma_bounds', gamma_bounds, math.inf), ('clip_bounds', clip_bounds, 1)):
            if not 0 <= low < high < end:
                raise ValueError(f'{name}={(low, high)} must be two numbers in [0, {end:g}), the lower first')
        self.target = target
        self.step = step
        self.rate = step or 0.  # without a step it depends on the length of the training
        self.damping = damping
        self.begin = begin
        self.decay = decay
        self.per_class = per_class
        self.num_classes = num_classes
        bounds = dict(gamma_neg=(1., *gamma_bounds), clip=(CLIP_PER_GAMMA, *clip_bounds))
        self.adapted = {name: bounds[name] for name in adapt}  # scale of the step, lowest, highest
        self.gaps: list[Tensor] = []  # before the last update; NaN: none yet
        self._resumed: list[dict] | None = None

    def before_run(self, runner: Runner) -> None:
        """Give the parameters value and shape, before EMAHook copies the model."""
        for loss in find_losses(runner.model):
            if _is_to_start(runner):
                # After FSDP's to_empty the values are garbage, after load_checkpoint those of another training.
                loss.reset_parameters()
            if self.per_class:
                classes = self._count_classes(runner.model, loss)
                for name in self.adapted:
                    setattr(loss, name, getattr(loss, name).expand(classes).clone())

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        if self.step is None:
            every = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
            self.rate = min(SPEED * every / runner.max_iters, HIGHEST_STEP)
        self.gaps = [torch.full_like(sums[0], torch.nan) for sums in self.sums]
        if self._resumed:
            for sums, gap, state in zip(self.sums, self.gaps, self._resumed):
                sums.copy_(state['sums'])
                gap.copy_(state['gap'])
            return
        if runner.iter > 0:
            raise RuntimeError(
                f'the training was resumed at iteration {runner.iter}, and AdaptiveAsymmetryHook got no checkpoint: '
                f'{type(getattr(runner, "strategy", runner)).__name__} passes its own by the hooks, as DeepSpeed does, '
                'so that gamma_neg would start anew. Resume with DDP or FSDP, or start from the weights (load_from)')
        for loss in self.losses:
            for name, (_, low, high) in self.adapted.items():
                values = getattr(loss, name)
                if not ((low <= values) & (values <= high)).all():
                    raise ValueError(f'{name}={values.tolist()} of the loss lies outside the bounds {low} to {high}: '
                                     'start inside them or widen them in AdaptiveAsymmetryHook')

    def control(self, number: int, gap: Tensor, renewed: Tensor, done: float) -> None:
        change = -self.damping * (gap - self.gaps[number]).nan_to_num(0)
        self.gaps[number].copy_(gap)
        if done < self.begin:
            return
        step = self.rate * (1 - done) if self.decay else self.rate
        change += step * renewed * (self.target - gap).clamp(-ERROR_LIMIT, ERROR_LIMIT).nan_to_num(0)
        for name, (scale, low, high) in self.adapted.items():
            getattr(self.losses[number], name).add_(scale * change).clamp_(low, high)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint[STATE] = [
            dict(gamma_neg=loss.gamma_neg.cpu(), clip=loss.clip.cpu(), sums=sums.cpu(), gap=gap.cpu())
            for loss, sums, gap in zip(self.losses, self.sums, self.gaps)]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if not runner._resume:
            if not _is_to_start(runner):
                restore_asymmetry(runner.model, checkpoint)  # a test
            return
        if not restore_asymmetry(runner.model, checkpoint):
            raise ValueError('the checkpoint to resume from was written without AdaptiveAsymmetryHook: start from its '
                             'weights (load_from, without resume), or remove the hook')
        self._resumed = checkpoint[STATE]
        per_class = any(state['sums'].dim() > 1 for state in self._resumed)
        if per_class != self.per_class:
            raise ValueError(f'per_class={self.per_class} of AdaptiveAsymmetryHook, and the checkpoint to resume from '
                             f'was written with per_class={per_class}: set that to resume, or start from its weights '
                             '(load_from, without resume)')

    def _count_classes(self, model: nn.Module, loss: AsymmetricLoss) -> int:
        own = [len(getattr(loss, name)) for name in self.adapted if getattr(loss, name).dim()]
        heads = [module for module in model.modules() if any(child is loss for child in module.children())]
        told = [getattr(head, name) for head in heads for name in ('cls_out_channels', 'num_classes')
                if isinstance(getattr(head, name, None), int)]
        for count in [self.num_classes, *own, *told]:
            if count is not None:
                return count
        raise ValueError('per_class=True needs the number of classes, and neither the loss nor its head tells it: give '
                         'AdaptiveAsymmetryHook num_classes, or the loss one gamma_neg a class')
