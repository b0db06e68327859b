"""What the heads on a feature map share: their base, label embeddings, attention layers and the last linear layer."""
import math
import os.path as osp
import re
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from mmcv.cnn.bricks.transformer import FFN, BaseTransformerLayer, MultiheadAttention
from mmpretrain.models.heads import MultiLabelClsHead
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mmasl.models.heads.calibrated_predictions import CalibratedPredictions
from mmasl.models.losses.asymmetric_loss import AsymmetricLoss


class FeatureMapHead(CalibratedPredictions, MultiLabelClsHead):
    """Base of the multi-label heads that look at the last feature map of a backbone, without a neck that pools it.

    With :class:`mmasl.AsymmetricLoss`, which has a posterior in closed form, it predicts as
    :class:`CalibratedPredictions`; with any other loss as MMPretrain's heads do.

    ``official_names`` maps names of the published weights, as regular expressions, to those here, with a function where
    the shape differs too. A state dict of either loads.

    Args:
        num_classes: Number of classes C.
        in_channels: Channels of the feature map.
        loss, thr, topk, init_cfg: As in MMPretrain's MultiLabelClsHead.

    Raises:
        ValueError: ``num_classes`` is below 1, or, as it runs, the features are no map of ``in_channels``.
    """
    official_names: dict[str, str | tuple[str, Callable[[Tensor], Tensor]]] = {}

    def __init__(self,
                 num_classes: int,
                 in_channels: int,
                 loss: dict | nn.Module = dict(type='mmpretrain.CrossEntropyLoss', use_sigmoid=True),
                 thr: float | None = None,
                 topk: int | None = None,
                 init_cfg: dict | list[dict] | None = None) -> None:
        if num_classes < 1:
            raise ValueError(f'num_classes={num_classes} must be at least 1: set model.head.num_classes')
        loss = loss if isinstance(loss, nn.Module) else MMPRETRAIN_MODELS.build(loss)
        self._base(loss).__init__(loss=loss, thr=thr, topk=topk, init_cfg=init_cfg)
        self.num_classes = num_classes
        self.in_channels = in_channels

    def _base(self, loss: nn.Module) -> Any:
        return super() if isinstance(loss, AsymmetricLoss) else super(CalibratedPredictions, self)

    def _get_predictions(self, cls_score: Tensor, data_samples: list[DataSample] | None) -> list[DataSample]:
        return self._base(self.loss_module)._get_predictions(cls_score, data_samples)

    def feature_map(self, feats: Sequence[Tensor]) -> Tensor:
        """The last of the backbone's outputs, (B, in_channels, H, W)."""
        x = feats[-1]
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'{type(self).__name__} got features of shape {tuple(x.shape)} and needs a map (B, {self.in_channels}, '
                'H, W): set model.head.in_channels to its channels; where a neck pools the map away, set '
                "model.neck=None; a vision transformer gives a map with model.backbone.out_type='featmap'")
        return x

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            for pattern, target in self.official_names.items():
                name, convert = (target, None) if isinstance(target, str) else target
                name, matches = re.subn(f'^{pattern}', name, key[len(prefix):])
                if matches:
                    value = state_dict.pop(key)
                    state_dict[prefix + name] = convert(value) if convert else value
                    break
        super()._load_from_state_dict(state_dict, prefix, *args)


class GroupLinear(nn.Module):
    """The group fully-connected layer of arXiv 2111.12933: class i is place i mod g of query i div g.

    Args:
        num_groups: Number of queries K; each has g = ceil(C / K) classes.
        in_channels: Channels D of a query.
        num_classes: Number of classes C; the places beyond C in the last groups are left out.
    """

    def __init__(self, num_groups: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        bound = 1 / math.sqrt(in_channels)
        self.weight = nn.Parameter(
            torch.empty(num_groups, in_channels, math.ceil(num_classes / num_groups)).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, queries: Tensor) -> Tensor:
        """Logits (B, C) of queries (B, K, D)."""
        logits = torch.einsum('bkd,kdg->bkg', queries, self.weight)
        return logits.flatten(1)[:, :self.num_classes] + self.bias


def attention_layer(*operations: str, embed_dims: int, num_heads: int, feedforward_channels: int,
                    dropout: float) -> BaseTransformerLayer:
    """MMCV's transformer layer on (B, N, embed_dims), of 'self_attn', 'cross_attn', 'ffn' and 'norm' in this order.

    Raises:
        ValueError: ``embed_dims`` is no multiple of ``num_heads``.
    """
    if embed_dims % num_heads:
        raise ValueError(f'embed_dims={embed_dims} must be a multiple of num_heads={num_heads}: change either in '
                         'model.head')
    return BaseTransformerLayer(
        attn_cfgs=dict(type=MultiheadAttention, embed_dims=embed_dims, num_heads=num_heads, attn_drop=dropout,
                       dropout_layer=dict(type='Dropout', drop_prob=dropout)),
        ffn_cfgs=dict(type=FFN, embed_dims=embed_dims, feedforward_channels=feedforward_channels, ffn_drop=dropout),
        operation_order=operations, batch_first=True)


def read_npz(path: str, *keys: str, cure: str) -> list[np.ndarray]:
    """Arrays of an .npz file, by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or lacks an array; the message ends in ``cure``.
    """
    if not osp.isfile(path):
        raise FileNotFoundError(f'There is no file {path} (relative paths start at the working directory): {cure}')
    try:
        with np.load(path, allow_pickle=False) as content:
            return [content[key] for key in keys]
    except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f'{path} is no .npz file with the arrays {list(keys)} ({error}): {cure}') from error


def load_label_embeddings(source: str | Sequence[Sequence[float]] | np.ndarray | Tensor, num_classes: int) -> Tensor:
    """One vector a class, float32 (C, d).

    Args:
        source: The vectors, or the file that holds them: .npy; .npz, as ``embeddings`` (as tools/label_graph.py --glove
            writes it); or any other name for a tensor that ``torch.save`` wrote. Nothing in a file is executed.
        num_classes: C.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, or holds something other than C finite vectors.
    """
    where, cure = 'label_embeddings', 'set model.head.label_embeddings to a file of one vector a class, in their order'
    if isinstance(source, str):
        where = source
        if source.endswith('.npz'):
            source, = read_npz(source, 'embeddings', cure='make it with tools/label_graph.py CONFIG --glove FILE')
        elif not osp.isfile(source):
            raise FileNotFoundError(f'There is no file of label embeddings {source}: {cure}')
        else:
            try:
                source = np.load(source, allow_pickle=False) if source.endswith('.npy') else torch.load(
                    source, map_location='cpu', weights_only=True)
            except Exception as error:  # torch.load and np.load fail in many ways on a foreign file
                raise ValueError(f'{where} cannot be read as an array or a tensor ({error}): {cure}') from error
    try:
        vectors = torch.as_tensor(source, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f'{where} holds no array of numbers ({error}): {cure}') from error
    if vectors.dim() != 2 or len(vectors) != num_classes:
        raise ValueError(f'{where} has shape {tuple(vectors.shape)}, but num_classes={num_classes} needs '
                         f'({num_classes}, d): {cure}, or correct model.head.num_classes')
    if not vectors.isfinite().all():
        raise ValueError(f'{where} is not finite for class {(~vectors.isfinite()).any(1).nonzero()[0].item()}: {cure}')
    return vectors
