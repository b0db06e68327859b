"""OFA-595: its size, its outputs, and released weights against the network written out in functions of PyTorch."""
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from mmasl.errors import CheckpointError, ConfigError
from mmasl.models.backbones import OFA595

# Of each block: kernel, stride, channels of the depthwise convolution, output channels, squeezed channels.
TABLE = """
3 1 24 24 0,    3 2 72 32 0,    5 1 128 32 0,   3 1 96 32 0,    5 2 128 48 32,  5 1 192 48 48,   3 1 288 48 72,
5 1 144 48 40,  7 2 288 96 0,   5 1 576 96 0,   3 1 288 96 0,   5 1 384 96 0,   3 1 576 136 144, 5 1 816 136 208,
7 1 816 136 208, 3 1 544 136 136, 3 2 816 192 208, 3 1 1152 192 288, 5 1 1152 192 288, 3 1 576 192 144"""
BLOCKS = [tuple(map(int, block.split())) for block in TABLE.split(',')]


def released(inner: str = 'mobile_inverted_conv', blocks: list = BLOCKS) -> dict[str, Tensor]:
    """Random weights with the names and shapes of the released files, with the 1x1 classifier of ImageNet21K's."""
    torch.manual_seed(0)
    state = {}

    def conv(name: str, out: int, into: int, kernel: int = 1, bn: bool = True) -> None:
        state[f'{name}.conv.weight'] = torch.randn(out, into, kernel, kernel) / (into * kernel * kernel)**0.5
        if bn:
            state.update({
                f'{name}.bn.weight': torch.rand(out) + 1, f'{name}.bn.bias': torch.randn(out) / 5,
                f'{name}.bn.running_mean': torch.randn(out) / 5, f'{name}.bn.running_var': torch.rand(out) + 0.5})

    conv('first_conv', 24, 3, 3)
    width = 24
    for number, (kernel, _, hidden, out, squeezed) in enumerate(blocks):
        name = f'blocks.{number}.{inner}'
        if hidden != width:
            conv(f'{name}.inverted_bottleneck', hidden, width)
        conv(f'{name}.depth_conv', hidden, 1, kernel)
        for key, shape in dict(reduce=(squeezed, hidden), expand=(hidden, squeezed)).items() if squeezed else ():
            state[f'{name}.depth_conv.se.fc.{key}.weight'] = torch.randn(*shape, 1, 1) / shape[1]**0.5
            state[f'{name}.depth_conv.se.fc.{key}.bias'] = torch.randn(shape[0])
        conv(f'{name}.point_linear', out, hidden)
        width = out
    conv('final_expand_layer', 1152, width)
    conv('feature_mix_layer', 1536, 1152, bn=False)
    state['classifier.linear.weight'], state['classifier.linear.bias'] = torch.randn(7, 1536, 1, 1), torch.randn(7)
    return state


def features(state: dict[str, Tensor], x: Tensor, smooth: bool) -> Tensor:
    """Input of the classifier, (N, 1536)."""
    swish, gate = (F.silu, torch.sigmoid) if smooth else (F.hardswish, F.hardsigmoid)

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f'{name}.conv.weight']
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])
        statistics = (state.get(f'{name}.bn.{key}') for key in ('running_mean', 'running_var', 'weight', 'bias'))
        return F.batch_norm(x, *statistics, eps=1e-5) if f'{name}.bn.weight' in state else x

    x = swish(conv(x, 'first_conv', 2))
    for number, (_, stride, hidden, _, squeezed) in enumerate(BLOCKS):
        name, before, act = f'blocks.{number}.mobile_inverted_conv', x, F.relu if number < 8 else swish
        if hidden != x.shape[1]:
            x = act(conv(x, f'{name}.inverted_bottleneck'))
        x = act(conv(x, f'{name}.depth_conv', stride))
        if squeezed:
            scale = x.mean((2, 3), keepdim=True)
            for key, function in dict(reduce=F.relu, expand=gate).items():
                scale = function(F.conv2d(scale, *(state[f'{name}.depth_conv.se.fc.{key}.{part}']
                                                   for part in ('weight', 'bias'))))
            x = x * scale
        x = conv(x, f'{name}.point_linear')
        if x.shape == before.shape:
            x = x + before
    x = swish(conv(x, 'final_expand_layer')).mean((2, 3), keepdim=True)
    return swish(conv(x, 'feature_mix_layer')).flatten(1)


def multiply_adds(model: nn.Module, size: int) -> int:
    """Of convolutions and linear layers, for one image."""
    total = 0

    def add(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(add)
    model.eval()(torch.empty(1, 3, size, size, device='meta'))
    return total


def test_size():
    """Its name states the multiply-adds at its own size with the classifier of ImageNet-1K."""
    with torch.device('meta'):
        assert multiply_adds(OFA595(), 236) + 1536 * 1000 == 595_189_032
        assert multiply_adds(OFA595(), 224) + 1536 * 1000 == 512_861_680


def test_strides_and_channels():
    indices = (0, 1, 4, 8, 12, 16, 20, 21, 22)
    with torch.device('meta'):
        outputs = MODELS.build(dict(type='mmasl.OFA595', out_indices=indices))(torch.empty(2, 3, 64, 96))
    assert [tuple(output.shape) for output in outputs] == [
        (2, 24, 32, 48), (2, 24, 32, 48), (2, 32, 16, 24), (2, 48, 8, 12), (2, 96, 4, 6), (2, 136, 4, 6),
        (2, 192, 2, 3), (2, 1152, 2, 3), (2, 1536, 1, 1)]


@pytest.mark.parametrize('smooth', [False, True])
def test_features_are_those_of_the_released_weights(tmp_path, smooth):
    state = released()
    torch.save(dict(state_dict=state), tmp_path / 'released.pth')
    model = OFA595(smooth, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'released.pth')))
    model.init_weights()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found, = model.eval()(images)
        expected = features(state, images, smooth)
        assert expected.std() > 1e-2
        assert (expected - features(state, images, not smooth)).abs().max() > 1e-2
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('inner', ['mobile_inverted_conv', 'conv'])
def test_released_weights_load_strictly(inner):
    state = released(inner)
    model = OFA595()
    model.load_state_dict(state)
    assert torch.equal(model.layers[6].se.conv2.conv.bias, state[f'blocks.5.{inner}.depth_conv.se.fc.expand.bias'])
    assert 'first_conv.conv.weight' in state, 'the dict that was passed is unchanged'
    other = nn.ModuleDict(dict(backbone=OFA595(out_indices=(4, 8, 16, 20))))
    other.load_state_dict({f'backbone.{key}': value for key, value in state.items()})
    own = model.state_dict()
    assert len(other.backbone.layers) == 21
    assert all(torch.equal(value, own[key]) for key, value in other.backbone.state_dict().items())
    model.load_state_dict(own)  # its own names


@pytest.mark.parametrize('blocks, message', [
    ([*BLOCKS[:1], (3, 2, 96, 32, 0), *BLOCKS[2:]], r'layers.2.expand_conv.conv.weight is \(96, 24, 1, 1\) in the'),
    (BLOCKS[:-1], r'layers.20.expand_conv.conv.weight is missing in the file')])
def test_other_networks_of_once_for_all_are_refused(tmp_path, blocks, message):
    """MMEngine would only warn."""
    torch.save(released(blocks=blocks), tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(OFA595(), str(tmp_path / 'other.pth'))


@pytest.mark.parametrize('indices', [(), (23, ), (-1, )])
def test_layers_that_do_not_exist(indices):
    with pytest.raises(ConfigError, match='out_indices of OFA595'):
        OFA595(out_indices=indices)


def test_trains():
    model = OFA595(out_indices=(8, 22))
    model.init_weights()
    sum(output.square().mean() for output in model(torch.randn(2, 3, 32, 32))).backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.slow
def test_exports():
    model = OFA595(out_indices=(8, 22))
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        exported = torch.export.export(model.eval(), (images, )).module()
        torch.testing.assert_close(exported(images), model(images))
