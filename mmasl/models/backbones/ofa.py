"""OFA-595, the third backbone of Fig. 8."""
from collections.abc import Mapping, Sequence
from typing import Any

from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmpretrain.models.utils import InvertedResidual
from torch import Tensor, nn

from mmasl.errors import CheckpointError, ConfigError
from mmasl.registry import MODELS

NETWORK = 'flops@595M_top1@80.0_finetune@75'  # of once-for-all
# Output channels, kernel, stride, channels of the depthwise convolution, swish instead of ReLU, squeeze and excitation.
BLOCKS = (
    (24, 3, 1, 24, False, False),
    (32, 3, 2, 72, False, False),
    (32, 5, 1, 128, False, False),
    (32, 3, 1, 96, False, False),
    (48, 5, 2, 128, False, True),
    (48, 5, 1, 192, False, True),
    (48, 3, 1, 288, False, True),
    (48, 5, 1, 144, False, True),
    (96, 7, 2, 288, True, False),
    (96, 5, 1, 576, True, False),
    (96, 3, 1, 288, True, False),
    (96, 5, 1, 384, True, False),
    (136, 3, 1, 576, True, True),
    (136, 5, 1, 816, True, True),
    (136, 7, 1, 816, True, True),
    (136, 3, 1, 544, True, True),
    (192, 3, 2, 816, True, True),
    (192, 3, 1, 1152, True, True),
    (192, 5, 1, 1152, True, True),
    (192, 3, 1, 576, True, True))
# Released name -> ours, after the number of the layer.
NAMES = {
    'inverted_bottleneck': 'expand_conv', 'depth_conv.se.fc.reduce': 'se.conv1.conv',
    'depth_conv.se.fc.expand': 'se.conv2.conv', 'depth_conv': 'depthwise_conv', 'point_linear': 'linear_conv'}


@MODELS.register_module()
class OFA595(BaseModule):
    """OFA-595: a MobileNetV3 found by architecture search, with 595 million multiply-adds at 236 px.

    Layer 0 is the stem, layers 1 to 20 are the blocks, and layer 21 is a convolution to 1152 channels. Layer 22 pools
    its output and computes the 1536 features of the classifier.

    Released weights load with ``init_cfg=dict(type='Pretrained', checkpoint=...)``; their names are converted. The
    activations must be those of the file, which does not state them:

    - once-for-all's file (ImageNet-1K) has hard swish and hard sigmoid: ``smooth=False``.
    - ``ofa_flops_595m_s_miil_21k.pth`` of Alibaba-MIIL/ImageNet21K has swish and sigmoid: ``smooth=True``.

    Source: Cai et al., Once for All (arXiv 1908.09791), specialized network ``flops@595M_top1@80.0_finetune@75``.

    Args:
        smooth: Whether swish and sigmoid replace hard swish and hard sigmoid.
        out_indices: Layers whose output is returned, from 0 to 22. Layers after the largest are not built. The last
            layers of strides 4, 8, 16 and 32 are 4, 8, 16 and 20, with 32, 48, 136 and 192 channels.
        norm_cfg: Normalization layer.
        init_cfg: Initialization. By default He's, by fan-out.

    Raises:
        ConfigError: ``out_indices`` is empty or names a layer that does not exist.
    """

    def __init__(self,
                 smooth: bool = False,
                 out_indices: Sequence[int] = (22, ),
                 norm_cfg: dict = dict(type='BN'),
                 init_cfg: dict | list[dict] | None = None) -> None:
        super().__init__(init_cfg or [dict(type='Kaiming', layer='Conv2d'),
                                      dict(type='Constant', layer='BatchNorm2d', val=1)])
        if not out_indices or not set(out_indices) <= set(range(len(BLOCKS) + 3)):
            raise ConfigError(f'out_indices of OFA595 is {out_indices!r}. Name one or more of its layers, 0 to '
                              f'{len(BLOCKS) + 2}')
        self.out_indices = tuple(out_indices)
        relu, swish = dict(type='ReLU'), dict(type='SiLU' if smooth else 'HSwish')
        gate = dict(type='Sigmoid' if smooth else nn.Hardsigmoid)  # MMCV's HSigmoid warns
        layers: list[nn.Module] = [ConvModule(3, 24, 3, stride=2, padding=1, norm_cfg=norm_cfg, act_cfg=swish)]
        width = 24
        for out, kernel, stride, hidden, with_swish, with_se in BLOCKS:
            layers.append(InvertedResidual(
                width, out, hidden, kernel, stride, norm_cfg=norm_cfg, act_cfg=swish if with_swish else relu,
                se_cfg=dict(channels=hidden, ratio=4, act_cfg=(relu, gate)) if with_se else None))
            width = out
        layers += [ConvModule(width, 1152, 1, norm_cfg=norm_cfg, act_cfg=swish),
                   nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvModule(1152, 1536, 1, bias=False, act_cfg=swish))]
        self.layers = nn.ModuleList(layers[:max(out_indices) + 1])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of ``out_indices``.

        Args:
            x: Images, (N, 3, H, W).

        Returns:
            Feature maps in the order of the layers; that of layer 22 is (N, 1536, 1, 1).
        """
        outputs = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.out_indices:
                outputs.append(x)
        return tuple(outputs)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Called by PyTorch's and MMEngine's ``load_state_dict``."""
        if f'{prefix}first_conv.conv.weight' in state_dict:
            released = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict)
                        if key.startswith(prefix)}
            converted, own = convert_ofa(released), self.state_dict()
            for key, value in own.items():
                found = tuple(converted[key].shape) if key in converted else 'missing'
                # MMEngine would warn and keep the initial weight. Old files have no num_batches_tracked.
                if found != tuple(value.shape) and not key.endswith('num_batches_tracked'):
                    raise CheckpointError(f'the file is not one of {NETWORK}: {key} is {found} in the file and '
                                          f'{tuple(value.shape)} in OFA595. Use the weights of this network')
            state_dict.update({prefix + key: converted[key] for key in own if key in converted})
        super()._load_from_state_dict(state_dict, prefix, *args)


def convert_ofa(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename released weights of OFA-595 to those of :class:`OFA595`.

    Args:
        state_dict: Weights in the layout of once-for-all and of Alibaba-MIIL/ImageNet21K.

    Returns:
        All weights but the classifier's.
    """
    layers = dict(first_conv='0', final_expand_layer=f'{len(BLOCKS) + 1}', feature_mix_layer=f'{len(BLOCKS) + 2}.1')
    converted = {}
    for key, value in state_dict.items():
        part, _, rest = key.partition('.')
        if part == 'blocks':  # later versions of once-for-all say conv for mobile_inverted_conv
            number, _, rest = rest.split('.', 2)
            rest = next((name + rest.removeprefix(released) for released, name in NAMES.items()
                         if rest.startswith(f'{released}.')), rest)
            converted[f'layers.{int(number) + 1}.{rest}'] = value
        elif part in layers:
            converted[f'layers.{layers[part]}.{rest}'] = value
    return converted
