"""Query2Label against its equations in loops, and the names and shapes of the published weights."""
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmasl.models.heads.query2label_head import Query2LabelHead, sine_position

SMALL = dict(num_heads=2, feedforward_channels=12)


def build(num_classes=3, in_channels=8, **kwargs):
    torch.manual_seed(0)
    head = Query2LabelHead(num_classes, in_channels, **SMALL | kwargs)
    for value in head.parameters():  # norms and biases are 1 and 0 otherwise
        nn.init.normal_(value, std=0.3)
    return head.eval()


# --- the equations, one image and one query at a time

def attend(module, query, keys, values):
    size = module.embed_dim // module.num_heads
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q = weights[0] @ query + biases[0]
    heads = []
    for head in range(module.num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = torch.stack([q[part] @ (weights[1] @ key + biases[1])[part] for key in keys]) / math.sqrt(size)
        share = scores.exp() / scores.exp().sum()
        heads.append(sum(s * (weights[2] @ value + biases[2])[part] for s, value in zip(share, values)))
    return module.out_proj.weight @ torch.cat(heads) + module.out_proj.bias


def normed(norm, x):
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * norm.weight + norm.bias


def fed_forward(layer, x):
    first, last = layer.ffns[0].layers[0][0], layer.ffns[0].layers[1]
    hidden = (first.weight @ x + first.bias).clamp(min=0)
    return normed(layer.norms[-1], x + last.weight @ hidden + last.bias)


def place(channels, y, x, height, width):
    """Positional encoding of DETR: y before x, sine before cosine, places from 1 and scaled to 2 pi."""
    out = []
    for here, side in ((y, height), (x, width)):
        for pair in range(channels // 4):
            angle = (here + 1) / side * 2 * math.pi / 10000**(2 * pair / (channels / 2))
            out += [math.sin(angle), math.cos(angle)]
    return torch.tensor(out)


def classify(head, image):
    if isinstance(head.proj, nn.Conv2d):
        image = torch.einsum('dc,chw->dhw', head.proj.weight[:, :, 0, 0], image) + head.proj.bias[:, None, None]
    channels, height, width = image.shape
    places = [(y, x) for y in range(height) for x in range(width)]
    tokens = [image[:, y, x] for y, x in places]
    position = [place(channels, y, x, height, width) for y, x in places]
    for layer in head.encoder:
        located = [token + here for token, here in zip(tokens, position)]
        updates = [attend(layer.attentions[0].attn, query, located, tokens) for query in located]
        tokens = [fed_forward(layer, normed(layer.norms[0], token + update)) for token, update in zip(tokens, updates)]
    located = [token + here for token, here in zip(tokens, position)]

    labels = [torch.zeros(channels) for _ in head.queries]
    for layer in head.decoder:
        if layer.num_attn == 2:
            asking = [label + own for label, own in zip(labels, head.queries)]
            updates = [attend(layer.attentions[0].attn, query, asking, labels) for query in asking]
            labels = [normed(layer.norms[0], label + update) for label, update in zip(labels, updates)]
        updates = [attend(layer.attentions[-1].attn, label + own, located, tokens)
                   for label, own in zip(labels, head.queries)]
        labels = [fed_forward(layer, normed(layer.norms[-2], label + update)) for label, update in zip(labels, updates)]
    return torch.stack([head.fc.weight[k, :, 0] @ normed(head.norm, label) + head.fc.bias[k]
                        for k, label in enumerate(labels)])


@pytest.mark.parametrize('kwargs', [
    {}, dict(embed_dims=12, num_heads=3), dict(num_encoder_layers=0, num_decoder_layers=1),
    dict(num_encoder_layers=2), dict(self_attention=True, num_decoder_layers=3)],
    ids=['published', 'projected', 'no encoder', 'encoders', 'self-attention'])
@torch.no_grad()
def test_equations(kwargs):
    head, maps = build(**kwargs), torch.randn(2, 8, 2, 3)
    assert_close(head((maps, )), torch.stack([classify(head, image) for image in maps]), rtol=1e-4, atol=1e-5)


def test_positions():
    assert_close(sine_position(16, 3, 5).view(3, 5, 16),
                 torch.stack([torch.stack([place(16, y, x, 3, 5) for x in range(5)]) for y in range(3)]),
                 rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_places_matter():
    """Without positions, and with none in the values, a turned map would give the same logits."""
    head, maps = build(), torch.randn(2, 8, 2, 3)
    assert not head((maps, )).allclose(head((maps.flip(3), )), rtol=0, atol=1e-4)


# --- published weights

def official_state(num_classes, dims, hidden, encoders=1, decoders=2, kept=(), project=False):
    """Names and shapes of a published checkpoint; ``kept`` are decoder layers with self-attention."""
    attention = {'in_proj_weight': (3 * dims, dims), 'in_proj_bias': (3 * dims, ), 'out_proj.weight': (dims, dims),
                 'out_proj.bias': (dims, )}
    shapes = {'query_embed.weight': (num_classes, dims), 'fc.W': (1, num_classes, dims), 'fc.b': (1, num_classes),
              'transformer.decoder.norm.weight': (dims, ), 'transformer.decoder.norm.bias': (dims, )}
    if project:
        shapes |= {'input_proj.weight': (dims, 8, 1, 1), 'input_proj.bias': (dims, )}
    layers = [(f'transformer.encoder.layers.{n}.', ('self_attn', ), (1, 2)) for n in range(encoders)]
    layers += [(f'transformer.decoder.layers.{n}.', ('self_attn', 'multihead_attn') if n in kept else
                ('multihead_attn', ), (1, 2, 3) if n in kept else (2, 3)) for n in range(decoders)]
    for prefix, attentions, norms in layers:
        shapes |= {f'{prefix}{name}.{part}': shape for name in attentions for part, shape in attention.items()}
        shapes |= {f'{prefix}norm{n}.{part}': (dims, ) for n in norms for part in ('weight', 'bias')}
        shapes |= {f'{prefix}linear1.weight': (hidden, dims), f'{prefix}linear1.bias': (hidden, ),
                   f'{prefix}linear2.weight': (dims, hidden), f'{prefix}linear2.bias': (dims, )}
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize('kept', [(), (1, 2)], ids=['without', 'with'])
@torch.no_grad()
def test_official_weights(kept):
    """The names lead to the places they are read from: logits from torch's own layers on the official state."""
    head = Query2LabelHead(3, 8, embed_dims=8, num_decoder_layers=3, self_attention=bool(kept), **SMALL).eval()
    state = official_state(3, 8, 12, decoders=3, kept=kept, project=True)
    head.load_state_dict(state, strict=True)

    def part(prefix):
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def run(name, query, keys, values):
        peer = nn.MultiheadAttention(8, 2, batch_first=True)
        peer.load_state_dict(part(name), strict=True)
        return peer(query, keys, values)[0]

    def norm(name, x):
        return nn.functional.layer_norm(x, (8, ), state[f'{name}.weight'], state[f'{name}.bias'])

    def feed(prefix, x):
        linear = nn.functional.linear
        hidden = linear(x, state[f'{prefix}linear1.weight'], state[f'{prefix}linear1.bias']).relu()
        return linear(hidden, state[f'{prefix}linear2.weight'], state[f'{prefix}linear2.bias'])

    maps, position = torch.randn(2, 8, 2, 3), sine_position(8, 2, 3)
    x = nn.functional.conv2d(maps, state['input_proj.weight'], state['input_proj.bias']).flatten(2).transpose(1, 2)
    prefix = 'transformer.encoder.layers.0.'
    x = norm(f'{prefix}norm1', x + run(f'{prefix}self_attn.', x + position, x + position, x))
    x = norm(f'{prefix}norm2', x + feed(prefix, x))
    queries = state['query_embed.weight']
    labels = torch.zeros(2, 3, 8)
    for n in range(3):
        prefix = f'transformer.decoder.layers.{n}.'
        if n in kept:
            asking = labels + queries
            labels = norm(f'{prefix}norm1', labels + run(f'{prefix}self_attn.', asking, asking, labels))
        labels = norm(f'{prefix}norm2', labels + run(f'{prefix}multihead_attn.', labels + queries, x + position, x))
        labels = norm(f'{prefix}norm3', labels + feed(prefix, labels))
    labels = norm('transformer.decoder.norm', labels)
    assert_close(head((maps, )), (state['fc.W'] * labels).sum(-1) + state['fc.b'], rtol=1e-4, atol=1e-5)


def test_the_whole_checkpoint_through_init_cfg(tmp_path):
    """As a config loads it: names of DistributedDataParallel, and a backbone that is not the head's."""
    state = official_state(3, 8, 12)
    path = tmp_path / 'checkpoint.pkl'
    torch.save(dict(state_dict={f'module.{name}': value for name, value in state.items()} | {
        'module.backbone.0.body.conv1.weight': torch.zeros(1), 'module.backbone.1.pe': torch.zeros(1)}), path)
    head = Query2LabelHead(3, 8, init_cfg=dict(type='Pretrained', checkpoint=str(path)), **SMALL)
    head.init_weights()
    assert_close(head.queries, state['query_embed.weight'], rtol=0, atol=0)
    assert_close(head.decoder[1].norms[1].bias, state['transformer.decoder.layers.1.norm3.bias'], rtol=0, atol=0)


def test_parameters():
    """Of the published model on ResNet-101 and COCO, whose head is three layers of 50.4 million."""
    with torch.device('meta'):
        head = Query2LabelHead(80, 2048)
    d, f, classes = 2048, 8192, 80
    layer = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d
    assert sum(value.numel() for value in head.parameters()) == 3 * layer + 2 * d + 2 * classes * d + classes
    assert layer == 50_358_272
    with torch.device('meta'):
        names = {name: tuple(value.shape) for name, value in official_state(80, d, f).items()}
    assert sum(math.prod(shape) for shape in names.values()) == 3 * layer + 2 * d + 2 * classes * d + classes


def test_initialisation():
    """Xavier in the transformer, as the published code has it."""
    head = Query2LabelHead(3, 64, num_heads=2, feedforward_channels=128)
    head.init_weights()
    bound = math.sqrt(6 / (64 + 128))
    for layer in (*head.encoder, *head.decoder):
        weight = layer.ffns[0].layers[0][0].weight
        assert 0.95 * bound < weight.abs().max() <= bound
    assert 0.8 < head.queries.std() < 1.2


@pytest.mark.parametrize('kwargs, message', [
    (dict(embed_dims=10, num_heads=2), 'embed_dims=10 must be a multiple of 4'),
    (dict(num_decoder_layers=0), 'num_decoder_layers=0 must be at least 1'),
    (dict(num_encoder_layers=-1), 'num_encoder_layers=-1 at least 0'),
    (dict(num_heads=3), 'embed_dims=8 must be a multiple of num_heads=3')], ids=['four', 'decoder', 'encoder', 'heads'])
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Query2LabelHead(3, 8, **SMALL | kwargs)
