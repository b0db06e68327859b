"""Probability sums that the asymmetric loss hands to hooks."""
from torch import Tensor


class ProbabilitySums:
    """Sums behind the probability gap (Eq. 9-10), per class, added up over the training calls of a loss.

    A reader sets ``enabled`` before training and calls :meth:`take` after each update. One reader at a time.

    Attributes:
        enabled: Whether the loss computes the sums in its training calls.
        total: (4, C), the sums since the last :meth:`take`, in the order that ``return_sums`` of
            :func:`mmasl.ops.asymmetric_loss` documents; None before the first call.
        loss: (), sum of the loss over all entries since the last :meth:`take`, before ``loss_weight`` and the
            reduction; None before the first call. Divided by the number of entries in ``total``, it does not depend on
            the batch size.
    """

    def __init__(self) -> None:
        self.enabled = False
        self.total: Tensor | None = None
        self.loss: Tensor | None = None

    def add(self, sums: Tensor, loss: Tensor | None = None) -> None:
        """Add the sums of one call, (4, C), and its loss, ()."""
        self.total = sums if self.total is None else self.total + sums
        if loss is not None:
            self.loss = loss if self.loss is None else self.loss + loss

    def take(self) -> Tensor | None:
        """Return the total and start again from nothing; None if the loss was not called."""
        total, self.total, self.loss = self.total, None, None
        return total
