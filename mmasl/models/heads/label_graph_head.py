"""ML-GCN (arXiv 1904.03582): a graph of the labels that occur together makes the classifiers of all classes."""
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmasl.models.heads.feature_map_head import FeatureMapHead, load_label_embeddings, read_npz
from mmasl.registry import MODELS


@MODELS.register_module()
class LabelGraphHead(FeatureMapHead):
    """ML-GCN: logits = pool(x) . W with W = A_hat LeakyReLU(A_hat E W_1) W_2 and A_hat of :func:`adjacency`.

    ``pool`` is global max pooling, E (C, d) the label embeddings and W (C, in_channels) one classifier a class. A_hat
    and E are part of the checkpoint. Weights of the published code (``gc1``, ``gc2``, and ``A``, which it turns
    round and normalises at each call) load by their names; its E lies in a file of its own.

    Args:
        num_classes, in_channels, loss, thr, topk, init_cfg: See :class:`FeatureMapHead`.
        graph: The .npz file that ``tools/label_graph.py CONFIG`` makes from the training labels.
        label_embeddings: One vector a class, see :func:`load_label_embeddings`; the paper's are GloVe's of 300 numbers.
            By default one-hot: then W_1 learns an embedding of each label.
        hidden_channels: Channels between the two layers.
        threshold: Least conditional probability of an edge, in (0, 1].
        neighbor_weight: p of Eq. 8 in [0, 1), the weight of a label's neighbors.

    Raises:
        FileNotFoundError: The graph or the file of label embeddings does not exist.
        ValueError: Either is damaged or not of C classes, or an argument is out of its range.
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
        """One classifier a class, (C, in_channels)."""
        hidden = F.leaky_relu(self.adjacency @ self.layers[0](self.label_embeddings), 0.2)
        return self.adjacency @ self.layers[1](hidden)

    def pre_logits(self, feats: Sequence[Tensor]) -> Tensor:
        """The map's largest values, (B, in_channels)."""
        return self.feature_map(feats).amax((2, 3))

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        """Logits (B, C) of a backbone's feature maps, of which the last counts."""
        return self.pre_logits(feats) @ self.classifiers().T


def load_cooccurrence(path: str, num_classes: int) -> Tensor:
    """Numbers of images with both of two labels, float64 (C, C), and with each label in the diagonal.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or not of C classes.
    """
    cure = 'make it with tools/label_graph.py CONFIG, and name it in model.head.graph'
    classes, counts = read_npz(path, 'classes', 'cooccurrence', cure=cure)
    if len(classes) != num_classes:
        raise ValueError(f'{path} is of {len(classes)} classes ({", ".join(map(str, classes[:3]))}, ...), and '
                         f'num_classes={num_classes}: {cure}, or correct model.head.num_classes')
    if counts.shape != (num_classes, num_classes) or (counts != counts.T).any() or (
            counts > np.diag(counts)).any() or (counts < 0).any():
        raise ValueError(f'cooccurrence of shape {counts.shape} in {path} is no symmetric count of the images with two '
                         f'of {num_classes} labels: {cure}')
    return torch.from_numpy(counts).double()


def adjacency(cooccurrence: Tensor, threshold: float, neighbor_weight: float) -> Tensor:
    """The graph as its layers use it, A_hat = D^-1/2 A' D^-1/2, float32 (C, C), by Eq. 7 and 8 of arXiv 1904.03582.

    P_ij = M_ij / N_i is the probability of label j where i is, A_ij = [P_ij >= threshold] (Eq. 7),
    A'_ij = A_ij p / sum_k!=i A_ik beside the diagonal and 1 - p on it (Eq. 8; its print lacks the factor A_ij), D the
    sums of the rows of A'.

    The published code has 0.25 and 1 in place of p = 0.2 and 1 - p, which gives the same A_hat. It differs in that it
    divides by the sums of columns and transposes: there a label learns from those that imply it, here from those it
    implies.

    Args:
        cooccurrence: See :func:`load_cooccurrence`. A label without images has no neighbors.
        threshold: In (0, 1].
        neighbor_weight: p, in [0, 1).

    Raises:
        ValueError: An argument is out of its range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f'threshold={threshold} must be above 0 and at most 1: change model.head.threshold')
    if not 0 <= neighbor_weight < 1:
        raise ValueError(f'neighbor_weight={neighbor_weight} must be in [0, 1): change model.head.neighbor_weight')
    counts = cooccurrence.double()
    images = counts.diagonal().unsqueeze(1)
    edges = ((counts >= threshold * images) & (counts > 0)).double().fill_diagonal_(0)
    weights = neighbor_weight * edges / edges.sum(1, keepdim=True).clamp(min=1)
    return normalize(weights.fill_diagonal_(1 - neighbor_weight)).float()


def normalize(weights: Tensor) -> Tensor:
    """D^-1/2 A D^-1/2 of weights A (C, C) with D the sums of its rows, which are positive."""
    scale = weights.sum(1).rsqrt()
    return scale.unsqueeze(1) * weights * scale
