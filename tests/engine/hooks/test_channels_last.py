"""mmasl.ChannelsLastHook: the layout of a model during a run, and its results."""
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import HOOKS
from torch import nn


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(),
                         nn.Linear(64, 2)).double()


def train(model: nn.Module, layouts: list[bool]) -> torch.Tensor:
    """Losses of three steps. ``layouts`` collects whether the first feature map has its channels last."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    model[0].register_forward_hook(lambda module, args, out: layouts.append(
        out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()))
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(3):
        loss = model(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_layout_changes_and_results_do_not():
    plain, changed = build(), build()
    HOOKS.build(dict(type='mmasl.ChannelsLastHook')).before_run(SimpleNamespace(model=changed))
    layouts: dict[str, list[bool]] = dict(plain=[], changed=[])
    expected, found = train(plain, layouts['plain']), train(changed, layouts['changed'])
    assert layouts == dict(plain=[False] * 3, changed=[True] * 3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    for name, value in changed.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-9, atol=1e-12)
        assert value.shape == plain.state_dict()[name].shape


@pytest.mark.parametrize('source', [True, False])
def test_checkpoints_fit_both_layouts(source, tmp_path):
    hook = HOOKS.build(dict(type='mmasl.ChannelsLastHook'))
    models = {last: build() for last in (True, False)}
    hook.before_run(SimpleNamespace(model=models[True]))
    train(models[source], [])
    torch.save(models[source].state_dict(), tmp_path / 'model.pth')
    models[not source].load_state_dict(torch.load(tmp_path / 'model.pth'))
    layouts: list[bool] = []
    train(models[not source], layouts)
    assert layouts == [not source] * 3
