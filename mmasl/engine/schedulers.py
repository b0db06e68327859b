"""What the training recipes need along the steps of a run and MMEngine lacks: the momentum of the one-cycle policy, and
a weight average whose horizon goes with the run's length."""
import math
from typing import Any

from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.momentum_scheduler import MomentumSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import INF, _ParamScheduler
from torch.optim import Optimizer

from mmasl.registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class OneCycleMomentum(MomentumSchedulerMixin, _ParamScheduler):
    """The momentum of the one-cycle policy: SGD's momentum, or beta1 of Adam and its kin.

    It is ``eta_max`` at first, ``eta_min`` where the learning rate is highest and ``eta_max`` at the end, each way half
    a cosine, with the values of PyTorch's ``OneCycleLR(cycle_momentum=True)``. MMEngine's ``OneCycleLR`` cycles the
    learning rate alone: set both, with the same ``pct_start``, ``begin`` and ``end``.

    Args:
        optimizer: The optimizer or its wrapper.
        eta_min, eta_max: Lowest and highest momentum, in [0, 1).
        pct_start: Share of the cycle until the turn, between 0 and 1.
        begin, end: Where the cycle begins and ends; with the training, if a config has no ``end``.
        **kwargs: As in MMEngine's schedulers. With ``convert_to_iter_based=True`` in the config, a schedule in epochs
            moves with each iteration.

    Raises:
        ValueError: An argument is out of its range, or the cycle has too few steps to turn.

    Example:
        >>> param_scheduler = [
        ...     dict(type='OneCycleLR', eta_max=2e-4, by_epoch=True, convert_to_iter_based=True),
        ...     dict(type='mmasl.OneCycleMomentum', by_epoch=True, convert_to_iter_based=True)]
    """

    def __init__(self,
                 optimizer: Optimizer | OptimWrapper,
                 eta_min: float = 0.85,
                 eta_max: float = 0.95,
                 pct_start: float = 0.3,
                 begin: int = 0,
                 end: int = INF,
                 **kwargs: Any) -> None:
        if not 0 <= eta_min <= eta_max < 1:
            raise ValueError(f'eta_min={eta_min} and eta_max={eta_max} must be two momenta in [0, 1), the lower first')
        if not 0 < pct_start < 1:
            raise ValueError(f'pct_start={pct_start} must be a share of the cycle, between 0 and 1')
        self.eta_min = eta_min
        self.eta_max = eta_max
        self.last = end - begin - 1
        self.turn = pct_start * (end - begin) - 1
        if not 0 < self.turn < self.last:
            raise ValueError(f'begin={begin}, end={end}: {end - begin} steps are too few to turn after '
                             f'pct_start={pct_start} of them; set convert_to_iter_based=True or a longer cycle')
        super().__init__(optimizer, begin=begin, end=end, **kwargs)

    @classmethod
    def build_iter_from_epoch(cls, *args: Any, begin: int = 0, end: int = INF, by_epoch: bool = True,
                              epoch_length: int | None = None, **kwargs: Any) -> 'OneCycleMomentum':
        """A schedule by iterations from settings in epochs."""
        if not by_epoch or not epoch_length:
            raise ValueError(f'by_epoch={by_epoch} and epoch_length={epoch_length}: only a schedule in epochs, of '
                             'known length, can be converted')
        kwargs |= dict(begin=int(begin * epoch_length), end=int(end * epoch_length), by_epoch=False)
        return cls(*args, **kwargs)

    def _get_value(self) -> list[float]:
        if self.last_step <= self.turn:
            share = (1 + math.cos(math.pi * self.last_step / self.turn)) / 2
        else:
            share = (1 - math.cos(math.pi * (self.last_step - self.turn) / (self.last - self.turn))) / 2
        return [self.eta_min + share * (self.eta_max - self.eta_min)] * len(self.optimizer.param_groups)
