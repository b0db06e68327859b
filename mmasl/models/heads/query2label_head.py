"""Query2Label (arXiv 2107.10834): a learned embedding of each label attends to the feature map."""
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from mmengine.model import ModuleList
from torch import Tensor, nn

from mmasl.errors import ConfigError
from mmasl.registry import MODELS

from .feature_map_head import FeatureMapHead, GroupLinear, attention_layer


@MODELS.register_module()
class Query2LabelHead(FeatureMapHead):
    """Query2Label: transformer encoder and decoder layers, followed by one linear layer for each class.

    Position encodings are added to keys and queries, not to values. Label embeddings are added to the queries of the
    decoder, which start at 0. The defaults are those of the published models on COCO; their state dicts
    (``transformer...``) load by name.

    Args:
        num_classes, in_channels, loss, thr, topk, init_cfg: See :class:`FeatureMapHead`.
        embed_dims: Channels of the transformer, a multiple of 4, after a 1x1 convolution. By default there is no
            convolution, as in the published models.
        num_heads: Attention heads.
        feedforward_channels: Hidden channels of the feed-forward networks.
        num_encoder_layers, num_decoder_layers: Numbers of layers, >= 0 and >= 1.
        self_attention: Use self-attention between the labels, as in the paper, in all decoder layers except the first,
            whose queries are 0. The published models do not use it.
        dropout: Dropout probability, in [0, 1).

    Raises:
        ConfigError: An argument is out of its range.
    """
    official_names = {
        r'input_proj\.': 'proj.',
        r'query_embed\.weight$': 'queries',
        r'fc\.W$': ('fc.weight', lambda weight: weight.transpose(0, 2).transpose(0, 1)),  # (1, C, D)
        r'fc\.b$': ('fc.bias', lambda bias: bias.flatten()),  # (1, C)
        r'transformer\.decoder\.norm\.': 'norm.',
        r'transformer\.(encoder|decoder)\.layers\.(\d+)\.linear1\.': r'\1.\2.ffns.0.layers.0.0.',
        r'transformer\.(encoder|decoder)\.layers\.(\d+)\.linear2\.': r'\1.\2.ffns.0.layers.1.',
        r'transformer\.(encoder|decoder)\.layers\.(\d+)\.self_attn\.': r'\1.\2.attentions.0.attn.',
        r'transformer\.encoder\.layers\.(\d+)\.norm1\.': r'encoder.\1.norms.0.',
        r'transformer\.encoder\.layers\.(\d+)\.norm2\.': r'encoder.\1.norms.1.'}

    def __init__(self,
                 num_classes: int,
                 in_channels: int,
                 embed_dims: int | None = None,
                 num_heads: int = 4,
                 feedforward_channels: int = 8192,
                 num_encoder_layers: int = 1,
                 num_decoder_layers: int = 2,
                 self_attention: bool = False,
                 dropout: float = 0.1,
                 init_cfg: dict | list[dict] | None = dict(type='Xavier', layer='Linear', distribution='uniform'),
                 **kwargs: Any) -> None:
        super().__init__(num_classes, in_channels, init_cfg=init_cfg, **kwargs)
        self.proj = nn.Identity() if embed_dims is None else nn.Conv2d(in_channels, embed_dims, 1)
        embed_dims = in_channels if embed_dims is None else embed_dims
        if embed_dims % 4:
            raise ConfigError(f'embed_dims={embed_dims} must be a multiple of 4, for sine and cosine of two '
                              'coordinates; change model.head.embed_dims.')
        if num_decoder_layers < 1 or num_encoder_layers < 0:
            raise ConfigError(f'num_decoder_layers={num_decoder_layers} must be at least 1, and num_encoder_layers='
                              f'{num_encoder_layers} at least 0; change model.head.')
        layer_of = partial(attention_layer, embed_dims=embed_dims, num_heads=num_heads,
                           feedforward_channels=feedforward_channels, dropout=dropout)
        self.encoder = ModuleList(
            layer_of('self_attn', 'norm', 'ffn', 'norm') for _ in range(num_encoder_layers))
        between_labels = ('self_attn', 'norm')
        self.decoder = ModuleList(
            layer_of(*between_labels * (self_attention and n > 0), 'cross_attn', 'norm', 'ffn', 'norm')
            for n in range(num_decoder_layers))
        self.norm = nn.LayerNorm(embed_dims)
        self.queries = nn.Parameter(torch.randn(num_classes, embed_dims))
        self.fc = GroupLinear(num_classes, embed_dims, num_classes)

        # A layer of the published code without self-attention has no norm1 either.
        for n, layer in enumerate(self.decoder):
            official, own, missing = rf'transformer\.decoder\.layers\.{n}\.', f'decoder.{n}.', 2 - layer.num_attn
            self.official_names = self.official_names | {
                official + r'multihead_attn\.': f'{own}attentions.{1 - missing}.attn.',
                **{official + rf'norm{m}\.': f'{own}norms.{m - 1 - missing}.' for m in range(1 + missing, 4)}}

    def pre_logits(self, feats: Sequence[Tensor]) -> Tensor:
        """Decode the label embeddings, (B, C, embed_dims)."""
        x = self.proj(self.feature_map(feats))
        position = sine_position(*x.shape[1:]).to(x)
        x = x.flatten(2).transpose(1, 2)
        for layer in self.encoder:
            x = layer(x, query_pos=position)
        labels = torch.zeros_like(self.queries).expand(x.shape[0], -1, -1)
        for layer in self.decoder:
            labels = layer(labels, x, x, query_pos=self.queries, key_pos=position)
        return self.norm(labels)

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        """Compute logits (B, C) from the last of the backbone's feature maps."""
        return self.fc(self.pre_logits(feats))


def sine_position(channels: int, height: int, width: int) -> Tensor:
    """Compute the sine position encoding of DETR (arXiv 2005.12872).

    The first half of the channels encodes y, the second x. Coordinates run from 1 to the side, scaled to 2 pi. Pair k
    of n has the wavelength 10000^(k / n).

    Args:
        channels: Number of channels, a multiple of 4.
        height, width: Sides of the map.

    Returns:
        float32 (height * width, channels).
    """
    pairs = channels // 4
    frequency = 10000.**(-torch.arange(pairs) / pairs)

    def encode(side: int) -> Tensor:
        angle = torch.arange(1, side + 1).unsqueeze(1) * (2 * math.pi / side) * frequency
        return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)

    y = encode(height).unsqueeze(1).expand(-1, width, -1)
    x = encode(width).unsqueeze(0).expand(height, -1, -1)
    return torch.cat((y, x), -1).flatten(0, 1)
