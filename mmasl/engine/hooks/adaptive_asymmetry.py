"""Control of the asymmetry by the probability gap (Sec. 2.7 of arXiv 2009.14119)."""
from typing import Any, Literal

import torch
from mmengine.runner import Runner
from torch import Tensor, nn

from mmasl.engine.hooks.probability_gap import ProbabilityGapHook
from mmasl.errors import CheckpointError, ConfigError
from mmasl.models.losses.utils import find_losses
from mmasl.registry import HOOKS
from mmasl.utils.runner import built_loop, checkpoint_name, is_resuming

STATE = 'adaptive_asymmetry'  # key in checkpoints
# What is controlled: its change per unit of gamma_neg that moves the gap about as far, lowest and highest value.
ADAPTED = dict(gamma_neg=(1., 0., 16.), clip=(0.05, 0., 0.5))
SPEED = 800  # sum of the steps of all updates of a training
MAX_STEP = 0.6  # with much larger steps the control is faster than the model, and oscillates
DAMPING = 3.
MAX_ERROR = 0.5  # larger distances from the target are clipped


def restore_asymmetry(model: nn.Module, checkpoint: dict) -> bool:
    """Set gamma_neg and clip of a model's losses to the final values of :class:`AdaptiveAsymmetryHook`.

    Calibrated probabilities need those values after training.

    Args:
        model: The trained model.
        checkpoint: Its loaded checkpoint.

    Returns:
        Whether the checkpoint has such values. If not, the losses keep the values of the config.

    Raises:
        CheckpointError: The checkpoint holds another number of losses.
    """
    if STATE not in checkpoint:
        return False
    losses, states = list(find_losses(model).values()), checkpoint[STATE]
    if len(losses) != len(states):
        raise CheckpointError(f'the checkpoint holds the asymmetry of {len(states)} losses and the model has '
                              f'{len(losses)}. Load it with the config that it was trained with')
    for loss, state in zip(losses, states):
        for name in ADAPTED:
            setattr(loss, name, state[name].to(getattr(loss, name)))
    return True


@HOOKS.register_module()
class AdaptiveAsymmetryHook(ProbabilityGapHook):
    """Steers gamma_neg of every :class:`mmasl.AsymmetricLoss` to a target probability gap (Sec. 2.7, Eq. 11).

    After each update,

        gamma_neg += step * (target - gap) - damping * (gap - previous gap)

    in [0, 16]. The first term is Eq. 11 with the opposite sign. As printed there, ``gap - target``, it is positive
    feedback: a larger gamma_neg raises the gap, so gamma_neg runs into a bound. The second term, with damping 3, stops
    gamma_neg from running ahead while the gap still moves, as in the first updates.

    The gap starts at 2 p - 1 for any gamma_neg, where p is the prior of the head's bias. From p = 0.05 it rises; from
    p = 0.5, where MMPretrain's heads start, it falls first, and ``begin`` must outlast that.

    The controlled values are in the checkpoint, beside the state dict. A resumed run continues with them. A run that
    only loads weights (``load_from``) starts from the config's.

    docs/analysis.md holds the measurements behind the defaults. On our digits a fixed gamma_neg of 1 is best: a target
    of 0.1 is 1.9 points of mAP below it, one of -0.2 is a tie. Control of the margin (``adapt='clip'`` from gamma_neg =
    1) gains 0.7 points over control of gamma_neg at target 0.1.

    Args:
        target: Target gap, in (-1, 1). The paper tries 0 to 0.3 (Table 3).
        adapt: 'gamma_neg' or 'clip'. The margin moves by 0.05 where gamma_neg would move by 1, in [0, 0.5].
        step: Change of gamma_neg per update and unit of gap, > 0 (lambda of Eq. 11). None: 800 / number of updates, at
            most 0.6, which reaches the target within about a tenth of the training.
        begin: Share of the training before control starts, in [0, 1). 0.2 is a warm start.

    Raises:
        ConfigError: An argument or the initial value is out of range, the model has no asymmetric loss, or a second
            hook reads its probabilities.
        CheckpointError: The checkpoint to resume from was written without this hook.

    Example:
        >>> custom_hooks = [dict(type='mmasl.AdaptiveAsymmetryHook', target=0.1)]
    """

    def __init__(self,
                 target: float = 0.1,
                 adapt: Literal['gamma_neg', 'clip'] = 'gamma_neg',
                 step: float | None = None,
                 begin: float = 0.02) -> None:
        super().__init__()
        if adapt not in ADAPTED:
            raise ConfigError(f"adapt={adapt!r} must be 'gamma_neg' or 'clip'")
        if not -1 < target < 1:
            raise ConfigError(f'target={target} must be a gap of two probabilities, between -1 and 1')
        if step is not None and not step > 0:
            raise ConfigError(f'step={step} must be above 0')
        if not 0 <= begin < 1:
            raise ConfigError(f'begin={begin} must be a share of the training, in [0, 1)')
        self.target = target
        self.adapt = adapt
        self.step = step
        self.begin = begin
        self.rate = 0.  # the step of this training
        self.gaps: list[Tensor] = []  # of the previous update, (); NaN: none yet
        self._resumed: list[dict] | None = None
        self._warned = False

    def before_run(self, runner: Runner) -> None:
        # Before EMAHook copies the model. After FSDP's to_empty the values are garbage, after runner.load_checkpoint
        # those of another training.
        if _starts_training(runner):
            for loss in find_losses(runner.model).values():
                loss.reset_parameters()

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        # DeepSpeed's wrapper has no such attribute.
        every = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        self.rate = self.step or min(SPEED * every / runner.max_iters, MAX_STEP)
        self.gaps = [torch.full_like(sums[0], torch.nan) for sums in self.sums]
        if self._resumed:
            for sums, gap, state in zip(self.sums, self.gaps, self._resumed):
                sums.copy_(state['sums'])
                gap.copy_(state['gap'])
            return
        if runner.iter > 0:
            strategy = type(getattr(runner, 'strategy', runner)).__name__
            raise CheckpointError(
                f'training resumes at iteration {runner.iter}, but {strategy} gives AdaptiveAsymmetryHook no '
                'checkpoint, so gamma_neg would start again. Use DDP or FSDP, or start from the weights (load_from)')
        _, low, high = ADAPTED[self.adapt]
        for loss in self.losses:
            values = getattr(loss, self.adapt)
            if not ((low <= values) & (values <= high)).all():
                raise ConfigError(f'{self.adapt}={values.tolist()} of the loss must lie in [{low}, {high}] for '
                                  'AdaptiveAsymmetryHook')

    def before_val_epoch(self, runner: Runner) -> None:
        # The values of a training may come back into range: a warning, once.
        if self._warned or not (problem := unreachable_threshold(runner.model)):
            return
        self._warned = True
        runner.logger.warning(f'AdaptiveAsymmetryHook has moved {self.adapt} so far that {problem}. No label of such a '
                              'class is predicted; scores and mAP are not affected. Lower thr of the head, raise '
                              "target, or use adapt='gamma_neg'")

    def control(self, number: int, gap: Tensor, renewed: Tensor, done: float) -> None:
        change = -DAMPING * (gap - self.gaps[number]).nan_to_num(0)
        self.gaps[number].copy_(gap)
        if done < self.begin:
            return
        change += self.rate * renewed * (self.target - gap).clamp(-MAX_ERROR, MAX_ERROR).nan_to_num(0)
        scale, low, high = ADAPTED[self.adapt]
        getattr(self.losses[number], self.adapt).add_(scale * change).clamp_(low, high)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint[STATE] = [
            dict(gamma_neg=loss.gamma_neg.cpu(), clip=loss.clip.cpu(), sums=sums.cpu(), gap=gap.cpu())
            for loss, sums, gap in zip(self.losses, self.sums, self.gaps)]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if not is_resuming(runner):
            restored = not _starts_training(runner) and restore_asymmetry(runner.model, checkpoint)  # a test
            if restored and (problem := unreachable_threshold(runner.model)):
                raise ConfigError(f'{checkpoint_name(runner)} has other parameters of the loss than the config, and '
                                  f'{problem}. Lower model.head.thr')
            return
        if not restore_asymmetry(runner.model, checkpoint):
            raise CheckpointError('the checkpoint to resume from was written without AdaptiveAsymmetryHook. Start from '
                                  'its weights (load_from, without resume), or remove the hook')
        self._resumed = checkpoint[STATE]


def unreachable_threshold(model: nn.Module) -> str:
    """Say why the threshold of a head with calibrated predictions cannot be exceeded; '' if all can."""
    heads: Any = [module for module in model.modules() if hasattr(module, 'unreachable_threshold')]
    return next((problem for head in heads if (problem := head.unreachable_threshold())), '')


def _starts_training(runner: Runner) -> bool:
    """Whether a training starts, which uses the config's asymmetry. A test uses the checkpoint's."""
    return built_loop(runner, 'train') is not None and runner.iter == 0  # in a test, runner.iter would build the data
