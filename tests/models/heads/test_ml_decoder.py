"""ML-Decoder against its equations in loops, timm's implementation, and names and shapes of the published weights."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers.ml_decoder import MLDecoder
from torch import nn
from torch.testing import assert_close

from mmasl.models.heads.ml_decoder_head import MLDecoderHead


def build(num_classes=6, in_channels=8, **kwargs):
    torch.manual_seed(0)
    head = MLDecoderHead(num_classes, in_channels, **dict(embed_dims=16, num_heads=4, feedforward_channels=24) | kwargs)
    for value in head.parameters():  # norms and biases are 1 and 0 otherwise
        nn.init.normal_(value, std=0.3)
    return head.eval()


def attend(module, query, memory):
    """softmax(Q K^T / sqrt(d)) V, for one query (D,) and tokens (L, D), a head at a time."""
    size = module.embed_dim // module.num_heads
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k, v = weights[0] @ query + biases[0], memory @ weights[1].T + biases[1], memory @ weights[2].T + biases[2]
    heads = []
    for head in range(module.num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = torch.stack([torch.dot(q[part], key[part]) for key in k]) / size**0.5
        heads.append(sum(p * value[part] for p, value in zip(scores.exp() / scores.exp().sum(), v)))
    return module.out_proj.weight @ torch.cat(heads) + module.out_proj.bias


def normed(norm, x):
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * norm.weight + norm.bias


def decode(head, image, query):
    """One query (D,) on one image (C, H, W)."""
    tokens = torch.stack([image[:, y, x] for y in range(image.shape[1]) for x in range(image.shape[2])])
    memory = (tokens @ head.proj.weight.T + head.proj.bias).clamp(min=0)
    layer = head.layer
    query = normed(head.norm, query + query)  # where self-attention stood
    query = normed(layer.norms[0], query + attend(layer.attentions[0].attn, query, memory))
    first, last = layer.ffns[0].layers[0][0], layer.ffns[0].layers[1]
    hidden = (first.weight @ query + first.bias).clamp(min=0)
    return normed(layer.norms[1], query + last.weight @ hidden + last.bias)


@pytest.mark.parametrize('num_groups', [1, 4, 6])
@torch.no_grad()
def test_equations(num_groups):
    head, maps = build(num_groups=num_groups), torch.randn(2, 8, 2, 3)
    size = -(-6 // num_groups)
    expected = torch.empty(2, 6)
    for n, image in enumerate(maps):
        for i in range(6):
            query = decode(head, image, head.queries[i // size])
            expected[n, i] = query @ head.fc.weight[i // size, :, i % size] + head.fc.bias[i]
    assert_close(head((maps, )), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('width', [5, 16], ids=['projected', 'as they are'])
@torch.no_grad()
def test_zero_shot_equations(width):
    """Queries are the label embeddings, and all classes share the last layer."""
    vectors, maps = torch.randn(6, width), torch.randn(2, 8, 2, 3)
    head = build(label_embeddings=vectors)
    expected = torch.empty(2, 6)
    for n, image in enumerate(maps):
        for i, vector in enumerate(vectors):
            query = vector if width == 16 else head.word_proj.weight @ vector + head.word_proj.bias
            expected[n, i] = decode(head, image, query.clamp(min=0)) @ head.fc.weight[0] + head.fc.bias[0]
    assert_close(head((maps, )), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_checkpoint_predicts_classes_it_has_not_seen():
    vectors, maps = torch.randn(9, 5), torch.randn(2, 8, 3, 3)
    seen, everything = build(6, label_embeddings=vectors[:6]), build(9, label_embeddings=vectors)
    everything.load_state_dict(seen.state_dict(), strict=True)
    assert 'label_embeddings' not in seen.state_dict()
    logits = everything((maps, ))
    assert_close(logits[:, :6], seen((maps, )), rtol=1e-5, atol=1e-6)
    # Order is of the config, too.
    turned = build(9, label_embeddings=vectors.flip(0))
    turned.load_state_dict(seen.state_dict(), strict=True)
    assert_close(turned((maps, )), logits.flip(1), rtol=1e-5, atol=1e-6)


def official_state(num_classes=9605, groups=200, channels=2048, dims=768, hidden=2048, prefix='head.'):
    """Names and shapes of a published checkpoint: those of its Open Images model by default."""
    size = -(-num_classes // groups)
    shapes = {
        'duplicate_pooling': (groups, dims, size), 'duplicate_pooling_bias': (num_classes, ),
        'layers.0.norm1.weight': (dims, ), 'layers.0.norm1.bias': (dims, ),
        'layers.0.multihead_attn.in_proj_weight': (3 * dims, dims),
        'layers.0.multihead_attn.in_proj_bias': (3 * dims, ),
        'layers.0.multihead_attn.out_proj.weight': (dims, dims), 'layers.0.multihead_attn.out_proj.bias': (dims, ),
        'layers.0.linear1.weight': (hidden, dims), 'layers.0.linear1.bias': (hidden, ),
        'layers.0.linear2.weight': (dims, hidden), 'layers.0.linear2.bias': (dims, ),
        'layers.0.norm2.weight': (dims, ), 'layers.0.norm2.bias': (dims, ),
        'layers.0.norm3.weight': (dims, ), 'layers.0.norm3.bias': (dims, ),
        'embed_standart.weight': (dims, channels), 'embed_standart.bias': (dims, ),
        'query_embed.weight': (groups, dims)}
    return {f'{prefix}decoder.{name}': 0.1 * torch.randn(shape) for name, shape in shapes.items()}


@torch.no_grad()
def test_official_weights_are_timm_s():
    """With classes that the groups do not divide: the same logits from the same weights."""
    peer = MLDecoder(7, num_of_groups=3, decoder_embedding=16, initial_num_features=8).eval()
    state = official_state(7, 3, 8, 16, prefix='')
    peer.load_state_dict({name if name.startswith('decoder.layers') else name.removeprefix('decoder.'): value
                          for name, value in state.items()}, strict=True)
    # As it is, timm's class does not run: torch 2's TransformerDecoder asks more of a layer than this one has.
    peer.decoder = peer.decoder.layers[0]
    head = MLDecoderHead(7, 8, num_groups=3, embed_dims=16).eval()
    head.load_state_dict(state, strict=True)
    maps = torch.randn(2, 8, 3, 4)
    assert_close(head((maps, )), peer(maps), rtol=1e-4, atol=1e-5)


def test_the_open_images_checkpoint_loads():
    """9,605 classes in 200 groups, under the prefix that it has in a whole model."""
    state = official_state()
    model = nn.Module()
    model.head = MLDecoderHead(9605, 2048, num_groups=200)
    model.load_state_dict(state, strict=True)
    assert len(state) == 19 and set(model.state_dict()) != set(state)
    assert_close(model.head.queries, state['head.decoder.query_embed.weight'], rtol=0, atol=0)
    assert_close(model.head.fc.weight, state['head.decoder.duplicate_pooling'], rtol=0, atol=0)
    wrong = official_state(9605, 100)
    with pytest.raises(RuntimeError, match='size mismatch for head.queries'):
        model.load_state_dict(wrong)


@torch.no_grad()
def test_official_zero_shot_weights():
    state = official_state(6, 6, 8, 16, prefix='')
    del state['decoder.query_embed.weight']
    state |= {'decoder.duplicate_pooling': torch.randn(16, 1), 'decoder.duplicate_pooling_bias': torch.randn(1),
              'wordvec_proj.weight': torch.randn(16, 5), 'wordvec_proj.bias': torch.randn(16)}
    head = MLDecoderHead(6, 8, embed_dims=16, label_embeddings=torch.randn(6, 5)).eval()
    head.load_state_dict(state, strict=True)
    maps = torch.randn(2, 8, 2, 2)
    expected = head.pre_logits((maps, )) @ state['decoder.duplicate_pooling'] + state['decoder.duplicate_pooling_bias']
    assert_close(head((maps, )), expected.squeeze(2), rtol=1e-5, atol=1e-5)


def count(head):
    return sum(value.numel() for value in head.parameters())


def test_parameters():
    with torch.device('meta'):
        coco, large = MLDecoderHead(80, 2048), MLDecoderHead(5000, 2048)
        learnable = MLDecoderHead(80, 2048, learnable_queries=True)
        peer = MLDecoder(80, num_of_groups=80)
    d, f = 768, 2048
    body = 2048 * d + d + 4 * d * d + 4 * d + 2 * d * f + f + d + 6 * d
    assert count(coco) == body + 80 * d + 80 * d + 80 == count(peer) == 7_212_112
    # 100 queries for 5,000 classes: the weights of a linear layer, and no more activations than the queries.
    assert count(large) == body + 100 * d + 5000 * d + 5000
    trained = {name for name, value in coco.named_parameters() if value.requires_grad}
    assert {name for name, value in learnable.named_parameters() if value.requires_grad} == trained | {'queries'}


def test_memory_of_5000_classes():
    """The largest tensor that a training step keeps is no larger than the logits, or the weights."""
    head = MLDecoderHead(5000, 8, embed_dims=16, num_heads=4, feedforward_channels=24)
    maps, kept = torch.randn(4, 8, 3, 3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = head((maps, )).square().mean()
    loss.backward()
    assert head.queries.shape == (100, 16) and max(kept) <= 5000 * 16
    assert head.fc.weight.grad.flatten(1).any(1).all()


def test_queries_are_drawn_once():
    head = build(num_groups=3)
    assert not head.queries.requires_grad and head.fc.weight.requires_grad
    before = head.queries.clone()
    head.init_weights()
    assert_close(head.queries, before, rtol=0, atol=0)


@torch.no_grad()
def test_dropout_differs_by_sample():
    head = build(dropout=0.5).train()
    logits = head((torch.ones(2, 8, 2, 2), ))
    assert not logits[0].allclose(logits[1])
    assert F.mse_loss(*head.eval()((torch.ones(2, 8, 2, 2), ))) < 1e-8


@pytest.mark.parametrize('kwargs, message', [
    (dict(num_groups=0), 'num_groups=0 is out of range'),
    (dict(num_groups=7), 'num_groups=7 is out of range'),
    (dict(num_groups=3, label_embeddings=np.eye(6)), 'num_groups=3 and .* exclude label_embeddings'),
    (dict(learnable_queries=True, label_embeddings=np.eye(6)), 'learnable_queries=True exclude'),
    (dict(label_embeddings=np.eye(5)), r'shape \(5, 5\), but num_classes=6'),
], ids=['none', 'many', 'groups', 'learnable', 'classes'])
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MLDecoderHead(6, 8, **kwargs)
