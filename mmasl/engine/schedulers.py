"""The momentum of the one-cycle policy, which MMEngine lacks."""
import math
from typing import Any

from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.momentum_scheduler import MomentumSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import INF, _ParamScheduler
from torch.optim import Optimizer

from mmasl.errors import ConfigError
from mmasl.registry import PARAM_SCHEDULERS


@PARAM_SCHEDULERS.register_module()
class OneCycleMomentum(MomentumSchedulerMixin, _ParamScheduler):
    """Momentum of the one-cycle policy: SGD's momentum, or beta1 of Adam-like optimizers.

    The momentum falls from ``eta_max`` to ``eta_min``, where the learning rate is highest, and rises to ``eta_max``
    again, both along half a cosine, as PyTorch's ``OneCycleLR(cycle_momentum=True)``. MMEngine's ``OneCycleLR`` changes
    the learning rate only: use both, with the same ``pct_start``, ``begin`` and ``end``.

    Args:
        optimizer: The optimizer or its wrapper.
        eta_min: Lowest momentum, in [0, 1).
        eta_max: Highest momentum, in [eta_min, 1).
        pct_start: Share of the cycle before the lowest momentum, in (0, 1).
        begin: First step of the cycle.
        end: End of the cycle; the end of the training if the config has none.
        **kwargs: As in MMEngine's schedulers. With ``convert_to_iter_based=True`` in the config, a schedule in epochs
            changes with each iteration.

    Raises:
        ConfigError: An argument is out of range, or the cycle has too few steps.

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
            raise ConfigError(f'eta_min={eta_min} and eta_max={eta_max} must be two momenta in [0, 1), the lower first')
        if not 0 < pct_start < 1:
            raise ConfigError(f'pct_start={pct_start} must be a share of the cycle, between 0 and 1')
        self.eta_min = eta_min
        self.eta_max = eta_max
        self.last = end - begin - 1
        self.turn = pct_start * (end - begin) - 1
        if not 0 < self.turn < self.last:
            raise ConfigError(f'begin={begin}, end={end}: {end - begin} steps are too few to turn after '
                              f'pct_start={pct_start} of them; set convert_to_iter_based=True or a longer cycle')
        super().__init__(optimizer, begin=begin, end=end, **kwargs)

    @classmethod
    def build_iter_from_epoch(cls, *args: Any, begin: int = 0, end: int = INF, by_epoch: bool = True,
                              epoch_length: int | None = None, **kwargs: Any) -> 'OneCycleMomentum':
        """Build a schedule by iterations from settings in epochs. MMEngine calls it."""
        if not by_epoch or not epoch_length:
            raise ConfigError(f'by_epoch={by_epoch} and epoch_length={epoch_length}: only a schedule in epochs of '
                              'known length can be converted. Remove convert_to_iter_based')
        kwargs |= dict(begin=int(begin * epoch_length), end=int(end * epoch_length), by_epoch=False)
        return cls(*args, **kwargs)

    def _get_value(self) -> list[float]:
        if self.last_step <= self.turn:
            share = (1 + math.cos(math.pi * self.last_step / self.turn)) / 2
        else:
            share = (1 - math.cos(math.pi * (self.last_step - self.turn) / (self.last - self.turn))) / 2
        return [self.eta_min + share * (self.eta_max - self.eta_min)] * len(self.optimizer.param_groups)
