"""ML-Decoder (arXiv 2111.12933): queries attend to the feature map, and each predicts a group of classes."""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmasl.errors import ConfigError
from mmasl.registry import MODELS

from .feature_map_head import FeatureMapHead, GroupLinear, attention_layer
from .label_embeddings import load_label_embeddings


@MODELS.register_module()
class MLDecoderHead(FeatureMapHead):
    """ML-Decoder: a decoder layer without self-attention, and a group fully-connected layer.

    With the tokens x of the feature map, the queries q and the cross-attention MHA(q, x):

    ====  =============================================
    m     relu(W x + b)
    q_1   LN(q + dropout(q)), in place of self-attention
    q_2   LN(q_1 + MHA(q_1, m))
    q_3   LN(q_2 + FFN(q_2))
    out   group fully-connected, see :class:`GroupLinear`
    ====  =============================================

    State dicts of the published code (``head.decoder...``) load by their names.

    Args:
        num_classes, in_channels, loss, thr, topk, init_cfg: See :class:`FeatureMapHead`.
        num_groups: Number of queries K. Each predicts ceil(C / K) classes. The default is min(100, C).
            ``num_groups=num_classes`` is the paper's full decoding.
        embed_dims: Channels of the queries.
        num_heads: Attention heads.
        feedforward_channels: Hidden channels of the feed-forward network.
        dropout: Dropout probability, in [0, 1).
        learnable_queries: Train the queries. By default they are fixed random vectors, as in the published code, since
            the projections of the attention can learn the same.
        label_embeddings: One vector a class for zero-shot prediction, see
            :func:`.label_embeddings.load_label_embeddings`. The projected vectors are the queries, and all classes
            share the last layer. The vectors are not part of the checkpoint, which therefore predicts any classes whose
            vectors the config names.

    Raises:
        ConfigError: An argument is out of its range, or excludes another.
        DataError: The file of label embeddings does not exist, is damaged, or has other classes.
    """
    official_names = {
        r'wordvec_proj\.': 'word_proj.',
        r'decoder\.embed_standart\.': 'proj.',
        r'decoder\.query_embed\.weight$': 'queries',
        # Zero-shot weights are (D, 1), since all classes share them; others are (K, D, g).
        r'decoder\.duplicate_pooling$': ('fc.weight', lambda weight: weight.T if weight.dim() == 2 else weight),
        r'decoder\.duplicate_pooling_bias$': 'fc.bias',
        r'decoder\.layers\.0\.norm1\.': 'norm.',
        r'decoder\.layers\.0\.norm2\.': 'layer.norms.0.',
        r'decoder\.layers\.0\.norm3\.': 'layer.norms.1.',
        r'decoder\.layers\.0\.multihead_attn\.': 'layer.attentions.0.attn.',
        r'decoder\.layers\.0\.linear1\.': 'layer.ffns.0.layers.0.0.',
        r'decoder\.layers\.0\.linear2\.': 'layer.ffns.0.layers.1.'}

    def __init__(self,
                 num_classes: int,
                 in_channels: int,
                 num_groups: int | None = None,
                 embed_dims: int = 768,
                 num_heads: int = 8,
                 feedforward_channels: int = 2048,
                 dropout: float = 0.1,
                 learnable_queries: bool = False,
                 label_embeddings: str | Sequence[Sequence[float]] | Tensor | None = None,
                 **kwargs: Any) -> None:
        super().__init__(num_classes, in_channels, **kwargs)
        self.proj = nn.Linear(in_channels, embed_dims)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(embed_dims)
        self.layer = attention_layer('cross_attn', 'norm', 'ffn', 'norm', embed_dims=embed_dims, num_heads=num_heads,
                                     feedforward_channels=feedforward_channels, dropout=dropout)
        self.zero_shot = label_embeddings is not None
        self.fc: nn.Module
        if label_embeddings is not None:
            if num_groups is not None or learnable_queries:
                raise ConfigError(f'num_groups={num_groups} and learnable_queries={learnable_queries} exclude '
                                  'label_embeddings, which are the queries; remove them from model.head.')
            vectors = load_label_embeddings(label_embeddings, num_classes)
            self.register_buffer('label_embeddings', vectors, persistent=False)
            width = vectors.shape[1]
            self.word_proj = nn.Identity() if width == embed_dims else nn.Linear(width, embed_dims)
            self.fc = nn.Linear(embed_dims, 1)
        else:
            num_groups = min(100, num_classes) if num_groups is None else num_groups
            if not 1 <= num_groups <= num_classes:
                raise ConfigError(f'num_groups={num_groups} is out of range; set model.head.num_groups from 1 to '
                                  f'num_classes={num_classes}.')
            self.queries = nn.Parameter(torch.randn(num_groups, embed_dims), requires_grad=learnable_queries)
            self.fc = GroupLinear(num_groups, embed_dims, num_classes)

    def pre_logits(self, feats: Sequence[Tensor]) -> Tensor:
        """Decode the queries, (B, K, embed_dims)."""
        memory = self.proj(self.feature_map(feats).flatten(2).transpose(1, 2)).relu()
        queries = self.word_proj(self.label_embeddings).relu() if self.zero_shot else self.queries
        queries = queries.expand(memory.shape[0], -1, -1)
        queries = self.norm(queries + self.dropout(queries))
        return self.layer(queries, memory, memory)

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        """Compute logits (B, C) from the last of the backbone's feature maps."""
        return self.fc(self.pre_logits(feats)).flatten(1)
