"""Hooks that watch the probabilities of positives and negatives while training, and steer the asymmetry by them
(Sec. 2.6 and 2.7 of arXiv 2009.14119).

What they read, :attr:`AsymmetricLoss.probability_sums`, falls out of the loss; nothing is computed twice.
"""
import math
from collections.abc import Sequence

import torch
from mmengine.runner import Runner
from torch import Tensor, nn

from mmasl.engine.hooks.probability_gap import ProbabilityGapHook, _is_to_start, find_losses
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.registry import HOOKS

STATE = 'adaptive_asymmetry'  # of the checkpoint
# A step of the margin for a step of 1 of gamma_neg that moves the gap about as far.
CLIP_PER_GAMMA = 0.05
SPEED = 800  # steps of all updates of a training together
HIGHEST_STEP = 0.6  # with much larger ones the control is quicker than the model answers, and oscillates
ERROR_LIMIT = 0.5  # what a larger distance from the target counts as


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
