"""Asymmetric focusing over a softmax, for one label a sample: in the authors' code, but not in the paper."""
import torch
import torch.nn.functional as F
from torch import Tensor

from .asymmetric_loss import asymmetric_loss
from .eager import in_range


def asymmetric_softmax_loss(logits: Tensor,
                            labels: Tensor,
                            gamma_pos: float = 0.,
                            gamma_neg: float = 4.,
                            smoothing: float = 0.1,
                            ignore_index: int | None = None) -> Tensor:
    """Softmax cross-entropy with label smoothing s, focused unequally on the label y and the other classes.

    With p = softmax(z) over C classes, g+ = ``gamma_pos`` and g- = ``gamma_neg``, as ``ASLSingleLabel`` of the official
    code has it, which smooths after focusing:

        L = -(1 - s + s / C) (1 - p_y)^g+ log p_y - (s / C) sum over c != y of p_c^g- log p_c

    Nothing else depends on g-: for s = 0 it has no effect, and with g+ = 0 the loss is cross-entropy. For g+ = g- = 0
    it is cross-entropy with label smoothing. For g- > 0 the smoothing works the other way round on every p_c below
    exp(-1 / g-) = 0.78 (g- = 4): it lowers p_c, since the gradient passes through the focusing weights, as there.

    What differs from :func:`mmasl.ops.asymmetric_loss`: classes compete for the probability; a negative has log p_c and
    not log(1 - p_c), no loss of its own beyond s / C, and no margin.

    Args:
        logits: (..., C), floating point, C >= 2, any finite value.
        labels: (...), integers in 0 ... C - 1.
        gamma_pos: Focusing parameter g+ >= 0 of the label.
        gamma_neg: Focusing parameter g- >= 0 of the other classes.
        smoothing: Share s in [0, 1) of the target that is spread evenly over all classes.
        ignore_index: Label of samples that have no loss and no gradient.

    Returns:
        Loss (...), in float64 for float64 logits and in float32 otherwise.

    Raises:
        ValueError: Shapes do not fit, or a label is out of range; as in :func:`mmasl.ops.asymmetric_loss`, the latter
            gives NaN on an accelerator.
        TypeError: Logits that are not floating point, or labels that are not integers.
    """
    if not logits.is_floating_point():
        raise TypeError(f'logits must be floating point, got {logits.dtype}')
    if not logits.dim() or labels.shape != logits.shape[:-1]:
        raise ValueError(f'labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}: '
                         'give one integer label a row, and no Mixup, CutMix or one-hot targets')
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f'labels must be integers, got {labels.dtype}')
    num_classes = logits.shape[-1]
    if num_classes < 2:
        raise ValueError(f'logits of shape {tuple(logits.shape)} have {num_classes} class: a softmax needs two or '
                         'more; mmasl.AsymmetricLoss takes a single logit')
    labels = labels.long().unsqueeze(-1)
    ignored = None if ignore_index is None else labels == ignore_index
    if ignored is not None:
        labels = labels.masked_fill(ignored, 0)
    allowed = f'0 to {num_classes - 1}{"" if ignore_index is None else f", {ignore_index} to ignore"}'
    known = in_range(labels, num_classes - 1, 'label', allowed)
    labels = labels.clamp(0, num_classes - 1)

    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # p_y is the sigmoid of the label's lead over all others together, which keeps 1 - p_y exact where p_y rounds to 1.
    lead = -(z - z.gather(-1, labels)).scatter(-1, labels, -torch.inf).logsumexp(-1, keepdim=True)
    share = smoothing / num_classes
    loss = (1 - smoothing + share) * asymmetric_loss(lead, torch.ones_like(lead), gamma_pos, 0, 0)
    if smoothing:
        log_p = F.log_softmax(z, -1)
        others = ((gamma_neg * log_p).exp() * -log_p).scatter(-1, labels, 0)
        loss = loss + share * others.sum(-1, keepdim=True)
    # An unchecked label out of range carries its NaN into the loss.
    loss = loss + 0. * known
    return (loss if ignored is None else loss.masked_fill(ignored, 0)).squeeze(-1)
