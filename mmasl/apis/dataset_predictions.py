"""Logits and labels of a whole data set, for analyses that need more than metrics."""
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from mmengine.runner.amp import autocast
from torch import Tensor
from torch.utils.data import DataLoader

from mmasl.errors import DataError
from mmasl.evaluation.metrics import MultiLabelMetric


class DatasetPredictions(NamedTuple):
    """Predictions for the N images of a data set.

    Args:
        logits: float32 (N, C), on the CPU.
        labels: int8 (N, C): 1 positive, 0 negative, -1 ignored.
        images: Path of each image, '' if unknown.
        classes: Names of the C classes, or their numbers if the data set has no names.
    """
    logits: Tensor
    labels: Tensor
    images: list[str]
    classes: list[str]


@torch.no_grad()
def predict_dataset(model: Any, loader: DataLoader, amp: bool = False,
                    progress: Callable[[Iterable, str], Iterable] = lambda items, what: items) -> DatasetPredictions:
    """Predict a data set with a multi-label classifier of MMPretrain.

    Args:
        model: The classifier, with its weights loaded; it is set to evaluation mode.
        loader: Loader of a data set with labels.
        amp: Whether to use automatic mixed precision.
        progress: Wraps the loader. Its second argument describes the step.

    Raises:
        DataError: The data set is empty, or a sample has no valid label.
    """
    model.eval()
    dataset: Any = loader.dataset
    reader = MultiLabelMetric()  # reads and checks labels
    reader.dataset_meta = dataset.metainfo
    logits: list[Tensor] = []
    images: list[str] = []
    for batch in progress(loader, 'predicting'):
        data = model.data_preprocessor(batch, False)
        with autocast(enabled=amp):
            logits.append(model(data['inputs'], mode='tensor').float().cpu())
        reader.process(None, [dict(sample.to_dict(), pred_score=z.sigmoid())
                              for sample, z in zip(data['data_samples'], logits[-1])])
        images += [sample.get('img_path') or '' for sample in data['data_samples']]
    if not logits:
        raise DataError('the data set has no images: check its annotation file and data_prefix')
    classes = dataset.metainfo.get('classes') or range(logits[0].shape[1])
    return DatasetPredictions(torch.cat(logits), torch.from_numpy(reader.labels()), images, list(map(str, classes)))
