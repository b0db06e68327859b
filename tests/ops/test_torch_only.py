"""The losses and the calibration need torch and numpy alone."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = """
import sys
for name in ('mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'cv2', 'scipy', 'matplotlib', 'PIL'):
    sys.modules[name] = None  # an import of it raises ImportError
"""
TRAIN = BLOCK + """
import torch
import mmasl
from mmasl import AsymmetricLoss, AsymmetricSoftmaxLoss, asymmetric_loss, linear_asymmetric_loss, posterior_threshold

torch.manual_seed(0)
features = torch.randn(64, 8)
labels = (features @ torch.randn(8, 3) > 0).float()
model = torch.nn.Linear(8, 3)
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
losses = []
for step in range(10):
    optimizer.zero_grad()
    loss = AsymmetricLoss()(model(features), labels)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 2, losses
AsymmetricSoftmaxLoss()(model(features), labels.long().argmax(1)).backward()
linear_asymmetric_loss(features, model.weight, model.bias, labels).backward()
assert 0.6 < posterior_threshold().sigmoid() < 0.7
assert 'ProbabilityGapHook' in dir(mmasl) and 'AsymmetricLoss' in mmasl.__all__
try:
    mmasl.ProbabilityGapHook
except ImportError:
    print('trained')
"""


def test_trains_without_openmmlab():
    done = subprocess.run([sys.executable, '-c', TRAIN], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ['trained']


def test_every_public_name_is_importable():
    pytest.importorskip('mmpretrain')
    import mmasl
    for name in mmasl.__all__:
        assert getattr(mmasl, name).__name__ == name
    with pytest.raises(AttributeError, match="'mmasl' has no attribute 'NoLoss'"):
        mmasl.NoLoss  # noqa: B018
