"""ML-GCN (arXiv 1904.03582): a graph of co-occurring labels generates the classifiers of all classes."""
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmasl.errors import ConfigError, DataError
from mmasl.registry import MODELS

from .feature_map_head import FeatureMapHead
from .label_embeddings import load_label_embeddings, read_npz

HINT = 'Write it with tools/label_graph.py CONFIG, and set model.head.graph to it.'


@MODELS.register_module()
class LabelGraphHead(FeatureMapHead):
    """ML-GCN: logits = pool(x) . W with W = A_hat LeakyReLU(A_hat E W_1) W_2 and A_hat of :func:`adjacency`.

    ``pool`` is global max pooling, E (C, d) are the label embeddings, and W (C, in_channels) is one classifier a class.
    The checkpoint contains A_hat and E. State dicts of the published code load by their names: ``gc1``, ``gc2`` and
    ``A``, which that code transposes and normalizes in each call. Its E is a separate file.

    Args:
        num_classes, in_channels, loss, thr, topk, init_cfg: See :class:`FeatureMapHead`.
        graph: The .npz file that ``tools/label_graph.py CONFIG`` writes from the training labels.
        label_embeddings: One vector a class, see :func:`.label_embeddings.load_label_embeddings`. The paper uses GloVe
            with 300 dimensions. The default is one-hot, so that W_1 learns an embedding of each label.
        hidden_channels: Channels between the two layers.
        threshold: Smallest conditional probability of an edge, in (0, 1].
        neighbor_weight: p of Eq. 8, the weight of a label's neighbors, in [0, 1).

    Raises:
        ConfigError: An argument is out of its range.
        DataError: The graph or the file of label embeddings does not exist, is damaged, or has other classes.
    """
    official_names = {
        r'gc1\.weight$': ('layers.0.weight', lambda weight: weight.T),
        r'gc2\.weight$': ('layers.1.weight', lambda weight: weight.T),
        r'A$': ('adjacency', lambda weights: normalize(weights).T)}

    def __init__(self,
                 num_classes: int,
                 in_channels: int,
                 graph: str,
                 label_embeddings: str | Sequence[Sequence[float]] | Tensor | None = None,
                 hidden_channels: int = 1024,
                 threshold: float = 0.4,
                 neighbor_weight: float = 0.2,
                 **kwargs: Any) -> None:
        super().__init__(num_classes, in_channels, **kwargs)
        vectors = torch.eye(num_classes) if label_embeddings is None else load_label_embeddings(
            label_embeddings, num_classes)
        self.register_buffer('label_embeddings', vectors)
        cooccurrence = load_cooccurrence(graph, num_classes)
        self.register_buffer('adjacency', adjacency(cooccurrence, threshold, neighbor_weight))
        self.layers = nn.ModuleList([nn.Linear(vectors.shape[1], hidden_channels, bias=False),
                                     nn.Linear(hidden_channels, in_channels, bias=False)])

    def classifiers(self) -> Tensor:
        """Compute one classifier for each class, (C, in_channels)."""
        hidden = F.leaky_relu(self.adjacency @ self.layers[0](self.label_embeddings), 0.2)
        return self.adjacency @ self.layers[1](hidden)

    def pre_logits(self, feats: Sequence[Tensor]) -> Tensor:
        """Pool the feature map by its maximum, (B, in_channels)."""
        return self.feature_map(feats).amax((2, 3))

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        """Compute logits (B, C) from the last of the backbone's feature maps."""
        return self.pre_logits(feats) @ self.classifiers().T


def load_cooccurrence(path: str, num_classes: int) -> Tensor:
    """Load the number of images with each pair of labels. The diagonal counts the images with one label.

    Args:
        path: The .npz file of tools/label_graph.py.
        num_classes: Number of classes C.

    Returns:
        float64 (C, C).

    Raises:
        DataError: The file does not exist, is damaged, or has other classes.
    """
    classes, counts = read_npz(path, 'classes', 'cooccurrence', hint=HINT)
    if len(classes) != num_classes:
        raise DataError(f'{path} has {len(classes)} classes ({", ".join(map(str, classes[:3]))}, ...), but num_classes='
                        f'{num_classes}. {HINT}')
    if counts.shape != (num_classes, num_classes) or (counts != counts.T).any() or (
            counts > np.diag(counts)).any() or (counts < 0).any():
        raise DataError(f'cooccurrence of shape {counts.shape} in {path} is not a symmetric count of images with two '
                        f'of {num_classes} labels. {HINT}')
    return torch.from_numpy(counts).double()


def adjacency(cooccurrence: Tensor, threshold: float, neighbor_weight: float) -> Tensor:
    """Compute the normalized graph A_hat = D^-1/2 A' D^-1/2 of Eq. 7 and 8 of arXiv 1904.03582.

    P_ij = M_ij / N_i is the probability of label j in images with label i, and A_ij = [P_ij >= threshold] (Eq. 7). Off
    the diagonal A'_ij = A_ij p / sum_k!=i A_ik, on it 1 - p (Eq. 8; the print lacks the factor A_ij). D are the row
    sums of A'.

    The published code uses 0.25 and 1 instead of p = 0.2 and 1 - p, which gives the same A_hat. But it divides by the
    sums of the columns and transposes. There, a label learns from the labels that imply it; here, as in the paper, from
    the labels that it implies.

    Args:
        cooccurrence: See :func:`load_cooccurrence`. A label without images has no neighbors.
        threshold: In (0, 1].
        neighbor_weight: p, in [0, 1).

    Returns:
        float32 (C, C).

    Raises:
        ConfigError: An argument is out of its range.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f'threshold={threshold} is out of range; set model.head.threshold in (0, 1].')
    if not 0 <= neighbor_weight < 1:
        raise ConfigError(f'neighbor_weight={neighbor_weight} is out of range; set one in [0, 1) in model.head.')
    counts = cooccurrence.double()
    images = counts.diagonal().unsqueeze(1)
    edges = ((counts >= threshold * images) & (counts > 0)).double().fill_diagonal_(0)
    weights = neighbor_weight * edges / edges.sum(1, keepdim=True).clamp(min=1)
    return normalize(weights.fill_diagonal_(1 - neighbor_weight)).float()


def normalize(weights: Tensor) -> Tensor:
    """Compute D^-1/2 A D^-1/2 of weights A (C, C), where D are the row sums, all positive."""
    scale = weights.sum(1).rsqrt()
    return scale.unsqueeze(1) * weights * scale
