"""Base class and layers of the heads on a feature map."""
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmcv.cnn.bricks.transformer import FFN, BaseTransformerLayer, MultiheadAttention
from mmpretrain.models.heads import MultiLabelClsHead
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mmasl.errors import ConfigError
from mmasl.models.losses import AsymmetricLoss

from .calibrated_predictions import CalibratedPredictions


class FeatureMapHead(CalibratedPredictions, MultiLabelClsHead):
    """Base class of multi-label heads on the last feature map of a backbone, without a neck.

    With :class:`mmasl.AsymmetricLoss`, predictions follow :class:`CalibratedPredictions`; with any other loss, they are
    those of MMPretrain's heads.

    State dicts with the names of the published code load too. ``official_names`` maps these names, as regular
    expressions, to the names here, with a function where the shape differs.

    Args:
        num_classes: Number of classes C, >= 1.
        in_channels: Channels of the feature map.
        loss, thr, topk, init_cfg: As in MMPretrain's MultiLabelClsHead.

    Raises:
        ConfigError: ``num_classes`` is below 1, or the features are not a map with ``in_channels`` channels.
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
            raise ConfigError(f'num_classes={num_classes} must be at least 1; set model.head.num_classes.')
        loss = loss if isinstance(loss, nn.Module) else MMPRETRAIN_MODELS.build(loss)
        self._base(loss).__init__(loss=loss, thr=thr, topk=topk, init_cfg=init_cfg)
        self.num_classes = num_classes
        self.in_channels = in_channels

    def _base(self, loss: nn.Module) -> Any:
        return super() if isinstance(loss, AsymmetricLoss) else super(CalibratedPredictions, self)

    def _get_predictions(self, cls_score: Tensor, data_samples: list[DataSample] | None) -> list[DataSample]:
        return self._base(self.loss_module)._get_predictions(cls_score, data_samples)

    def feature_map(self, feats: Sequence[Tensor]) -> Tensor:
        """Select the last feature map of the backbone, (B, in_channels, H, W)."""
        x = feats[-1]
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ConfigError(
                f'{type(self).__name__} got features of shape {tuple(x.shape)}, expected (B, {self.in_channels}, H, '
                'W). Set model.head.in_channels to the channels of the map, model.neck=None, and for vision '
                "transformers model.backbone.out_type='featmap'.")
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
    """Group fully-connected layer of arXiv 2111.12933: query i // g predicts class i as its output i mod g.

    Args:
        num_groups: Number of queries K. Each predicts g = ceil(C / K) classes.
        in_channels: Channels D of a query.
        num_classes: Number of classes C. Outputs beyond C are dropped.
    """

    def __init__(self, num_groups: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        bound = 1 / math.sqrt(in_channels)
        self.weight = nn.Parameter(
            torch.empty(num_groups, in_channels, math.ceil(num_classes / num_groups)).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, queries: Tensor) -> Tensor:
        """Compute logits (B, C) from queries (B, K, D)."""
        logits = torch.einsum('bkd,kdg->bkg', queries, self.weight)
        return logits.flatten(1)[:, :self.num_classes] + self.bias


def attention_layer(*operations: str, embed_dims: int, num_heads: int, feedforward_channels: int,
                    dropout: float) -> BaseTransformerLayer:
    """Build MMCV's transformer layer on (B, N, embed_dims).

    Args:
        *operations: 'self_attn', 'cross_attn', 'ffn' and 'norm', in the order of the layer.
        embed_dims: Channels, a multiple of ``num_heads``.
        num_heads: Attention heads.
        feedforward_channels: Hidden channels of the feed-forward network.
        dropout: Dropout probability, in [0, 1).

    Raises:
        ConfigError: ``embed_dims`` is not a multiple of ``num_heads``.
    """
    if embed_dims % num_heads:
        raise ConfigError(f'embed_dims={embed_dims} must be a multiple of num_heads={num_heads}; change either in '
                          'model.head.')
    return BaseTransformerLayer(
        attn_cfgs=dict(type=MultiheadAttention, embed_dims=embed_dims, num_heads=num_heads, attn_drop=dropout,
                       dropout_layer=dict(type='Dropout', drop_prob=dropout)),
        ffn_cfgs=dict(type=FFN, embed_dims=embed_dims, feedforward_channels=feedforward_channels, ffn_drop=dropout),
        operation_order=operations, batch_first=True)
