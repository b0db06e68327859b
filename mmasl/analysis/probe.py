"""Compares settings of the loss by linear heads on frozen features: computes features, trains many heads at once.

A head is a linear layer per class, as MultiLabelLinearClsHead has it. Heads of several learning rates, weight decays
and subsets of the images train side by side, because one head alone leaves a CPU idle.
"""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmasl.analysis.gradient import Setting
from mmasl.errors import DataError
from mmasl.evaluation.functional import average_precision, count_outcomes, precision_recall_f1
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss
from mmasl.ops import posterior_threshold, use_implementation


@dataclass(frozen=True)
class Trial:
    """One point of the search for a setting.

    Args:
        lr: Maximal learning rate of the one-cycle policy, > 0.
        weight_decay: Decoupled weight decay of AdamW on the weights, >= 0; biases have none.
    """
    lr: float
    weight_decay: float


TRIALS = tuple(Trial(lr, weight_decay) for lr in (5e-4, 2e-3, 8e-3, 3.2e-2) for weight_decay in (0.01, 0.3))
EPOCHS = 20
BATCH_SIZE = 64
INIT_STD = 0.01  # of MMPretrain's linear heads
FOLDS = 5


@dataclass(frozen=True)
class Scores:
    """Figures of a setting in percent, one value for each fold or repetition, (R,).

    Args:
        ap: Average precision of each class, (R, C); NaN for a class without positives.
        cf1, of1: F1 over the classes and over all labels, at p = 1/2.
        cf1_calibrated, of1_calibrated: The same where the closed-form posterior is 1/2.
    """
    ap: np.ndarray
    cf1: np.ndarray
    of1: np.ndarray
    cf1_calibrated: np.ndarray
    of1_calibrated: np.ndarray

    @property
    def map(self) -> np.ndarray:
        """Mean of the average precision over all classes that have positives, (R,)."""
        return np.nanmean(self.ap, axis=1)


@torch.no_grad()
def extract_features(model: Any, batches: Iterable, num_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the input of a classifier's head and the labels, batch by batch.

    Feature maps are averaged over their positions.

    Args:
        model: A classifier of MMPretrain. It is set to evaluation mode.
        batches: Collated batches of a data loader.
        num_classes: Number C of classes.

    Yields:
        Features, float32 (B, D), and labels, int8 (B, C): 1 positive, 0 negative, -1 ignored.

    Raises:
        DataError: An image has no labels.
    """
    model.eval()
    for batch in batches:
        data = model.data_preprocessor(batch, False)
        features = model.extract_feat(data['inputs'], stage='neck')
        features = features[-1] if isinstance(features, (tuple, list)) else features
        labels = torch.zeros(len(features), num_classes, dtype=torch.int8)
        for row, sample in zip(labels, data['data_samples']):
            if 'gt_score' in sample:
                row.copy_(sample.gt_score.sign())
            elif 'gt_label' in sample:
                row[sample.gt_label] = 1
            else:
                raise DataError(f'{sample.get("img_path")} has no gt_label or gt_score. Use the annotated training set')
        yield features.float().flatten(2).mean(-1) if features.ndim > 2 else features.float(), labels


def fit_heads(features: Tensor, labels: Tensor, rows: Tensor, setting: Setting, trials: Sequence[Trial] = TRIALS, *,
              epochs: int = EPOCHS, batch_size: int = BATCH_SIZE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Train linear heads by AdamW and the one-cycle policy, for every trial on every subset of the images.

    Args:
        features: Float (N, D).
        labels: (N, C), or (R, N, C) for other labels in each subset: 1, 0, or -1 for ignored.
        rows: Images of each subset, int64 (R, n).
        setting: Parameters of the loss, which is averaged over the images.
        trials: Learning rates and weight decays; T of them.
        epochs: Length of the training.
        batch_size: Images per step of each head; at most n are used.
        seed: Seed of the initial weights and of the order.

    Returns:
        Weights (T, R, D, C) and biases (T, R, 1, C).
    """
    count, size = rows.shape
    batch_size = min(batch_size, size)
    classes, generator = labels.shape[-1], torch.Generator().manual_seed(seed)
    weights = [INIT_STD * torch.randn(count, features.shape[1], classes, generator=generator) for _ in trials]
    biases = [torch.zeros(count, 1, classes) for _ in trials]
    groups: list[dict[str, Any]] = [
        dict(params=[parameter.requires_grad_()], lr=trial.lr, weight_decay=decay)
        for trial, weight, bias in zip(trials, weights, biases, strict=True)
        for parameter, decay in ((weight, trial.weight_decay), (bias, 0.))]
    optimizer = torch.optim.AdamW(groups, fused=True)
    steps = size // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group['lr'] for group in groups], epochs * steps, cycle_momentum=False)
    loss = AsymmetricLoss(**asdict(setting), reduction='sum', ignore_index=-1)
    subsets = torch.arange(count)[:, None]
    with use_implementation('eager'), torch.enable_grad():
        for _ in range(epochs):
            order = torch.stack([row[torch.randperm(size, generator=generator)] for row in rows])
            for batch in order[:, :steps * batch_size].split(batch_size, dim=1):
                x, y = features[batch], (labels[batch] if labels.ndim == 2 else labels[subsets, batch]).float()
                logits = torch.stack([torch.baddbmm(bias, x, weight) for weight, bias in zip(weights, biases)])
                optimizer.zero_grad()
                (loss(logits, y.expand_as(logits)) / batch_size).backward()
                optimizer.step()
                schedule.step()
    return torch.stack(weights).detach(), torch.stack(biases).detach()


def score(logits: Tensor, labels: Tensor, setting: Setting) -> Scores:
    """Figures of R predictions.

    Args:
        logits: (R, n, C).
        labels: (R, n, C) or (n, C): 1 positive, 0 negative, -1 ignored.
        setting: Loss that the predictions were trained with.
    """
    threshold = posterior_threshold(0.5, **asdict(setting)).item()
    known = np.broadcast_to(labels.numpy(), logits.shape)
    ap = 100 * np.stack([average_precision(z.numpy(), y) for z, y in zip(logits, known)])
    at = [[precision_recall_f1(*count_outcomes(z.numpy() > cut, y)) for z, y in zip(logits, known)]
          for cut in (0., threshold)]
    return Scores(ap, *(np.array([found[name] for found in which]) for which in at for name in ('CF1', 'OF1')))


def search(features: Tensor, labels: Tensor, setting: Setting, trials: Sequence[Trial] = TRIALS, *, folds: int = FOLDS,
           epochs: int = EPOCHS, seed: int = 0) -> tuple[Trial, Scores]:
    """Cross-validate every trial of a setting, and select the one with the best mean mAP.

    Then half and twice the learning rate of the best trial are tried, until neither is better. So the result does not
    depend on where the grid ends, and settings whose best rates lie between its points are not at a disadvantage.

    Args:
        features: Float (N, D).
        labels: (N, C).
        setting: Parameters of the loss.
        trials: Points to begin with, the same for every setting that is to be compared.
        folds: Number of folds, at least 2. The folds depend on ``seed`` alone.
        epochs: Length of each training.
        seed: Seed of the folds and trainings.

    Returns:
        The best trial, and its figures on each fold. The search has used the folds, so they flatter every setting
        slightly.
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    held_out = order[:len(order) // folds * folds].reshape(folds, -1)
    rows = torch.stack([torch.cat([held_out[other] for other in range(folds) if other != fold])
                        for fold in range(folds)])
    found: dict[Trial, Scores] = {}
    while trials:
        fitted = fit_heads(features, labels, rows, setting, trials, epochs=epochs, seed=seed)
        found |= {trial: score(torch.baddbmm(bias, features[held_out], weight), labels[held_out], setting)
                  for trial, weight, bias in zip(trials, *fitted)}
        best = max(found, key=lambda trial: found[trial].map.mean())
        trials = [near for factor in (0.5, 2) if (near := replace(best, lr=factor * best.lr)) not in found]
    return best, found[best]
