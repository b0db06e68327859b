"""Reading, converting, comparing and finding checkpoints.

Names and shapes of the official files are written from the published architecture, not taken from timm.
"""
import os
import re
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import numpy as np
import pytest
import timm
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule, PretrainedInit
from mmengine.optim import OneCycleLR
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from mmengine.runner.checkpoint import load_checkpoint as mmengine_load
from torch import nn

from mmasl.engine.hooks import checkpoint as hooks
from mmasl.engine.hooks.checkpoint import AdaptCheckpointHook
from mmasl.engine.hooks.ema import RelativeEMAHook
from mmasl.errors import CheckpointError
from mmasl.utils import checkpoint
from mmasl.utils.checkpoint import (
    check_pretrained,
    check_state_dict,
    convert_official,
    describe_misfit,
    find_checkpoint,
    inner_model,
    is_official,
    load_weights,
    match_rows,
    read_checkpoint,
    safe_checkpoint_loading,
    state_of,
    strip_wrappers,
    unwrap_model,
)

# blocks of the four stages, width
TRESNETS = dict(tresnet_m=((3, 4, 11, 3), 64), tresnet_l=((4, 5, 18, 3), 76), tresnet_xl=((4, 5, 24, 3), 83))


def official_shapes(name: str, num_classes: int, bottleneck: int | None = None) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a released file: convolutions, then InPlaceABN, which counts no batches."""
    shapes = {}

    def conv(key: str, channels_in: int, channels_out: int, kernel: int) -> None:
        shapes[f'{key}.0.weight'] = (channels_out, channels_in, kernel, kernel)
        for part in ('weight', 'bias', 'running_mean', 'running_var'):
            shapes[f'{key}.1.{part}'] = (channels_out, )

    blocks, width = TRESNETS[name]
    conv('body.conv1', 48, width, 3)
    channels = width
    for stage, count in enumerate(blocks):
        planes, expansion = width * 2**stage, 4 if stage > 1 else 1
        for block in range(count):
            key, stride = f'body.layer{stage + 1}.{block}', 2 if stage and not block else 1
            # Where the image shrinks, the convolution and its norm are followed by an anti-aliasing filter.
            strided = '.0' if stride == 2 else ''
            if expansion == 1:
                conv(f'{key}.conv1{strided}', channels, planes, 3)
                conv(f'{key}.conv2', planes, planes, 3)
            else:
                conv(f'{key}.conv1', channels, planes, 1)
                conv(f'{key}.conv2{strided}', planes, planes, 3)
                conv(f'{key}.conv3', planes, planes * expansion, 1)
            if stage < 3:
                squeezed = max(planes * expansion // (4 if expansion == 1 else 8), 64)
                for part, out, into in (('fc1', squeezed, planes), ('fc2', planes, squeezed)):
                    shapes[f'{key}.se.{part}.weight'], shapes[f'{key}.se.{part}.bias'] = (out, into, 1, 1), (out, )
            if not block and (stride == 2 or channels != planes * expansion):
                conv(f'{key}.downsample.{1 if stride == 2 else 0}', channels, planes * expansion, 1)
            channels = planes * expansion
    if bottleneck:
        shapes |= {'head.fc.embedding_generator.0.weight': (bottleneck, channels),
                   'head.fc.embedding_generator.0.bias': (bottleneck, ),
                   'head.fc.FC.weight': (num_classes, bottleneck), 'head.fc.FC.bias': (num_classes, )}
    else:
        shapes |= {'head.fc.weight': (num_classes, channels), 'head.fc.bias': (num_classes, )}
    return shapes


def official_file(name: str, classes: tuple[str, ...], **kwargs) -> dict:
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator) * 0.05
             for key, shape in official_shapes(name, len(classes), **kwargs).items()}
    for key in state:
        if key.endswith('running_var'):
            state[key] = state[key].abs() + 1
    return dict(model=state, num_classes=len(classes), idx_to_class=dict(enumerate(classes)))


def classifier(name: str, channels: int, num_classes: int) -> nn.Module:
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(dict(
            type='ImageClassifier', backbone=dict(type='TIMMBackbone', model_name=name),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='MultiLabelLinearClsHead', in_channels=channels, num_classes=num_classes,
                      loss=dict(type='mmasl.AsymmetricLoss'))))


# --- the official layout

@pytest.mark.parametrize('name', TRESNETS)
def test_every_key_finds_its_place(name):
    shapes = official_shapes(name, 80)
    with torch.device('meta'):
        checkpoint = dict(model={key: torch.empty(shape) for key, shape in shapes.items()})
        model = classifier(name, shapes['head.fc.weight'][1], 80)
    assert is_official(checkpoint) and is_official(checkpoint['model'])
    expected = {key: value.shape for key, value in model.state_dict().items()
                if not key.endswith('num_batches_tracked')}
    found = convert_official(checkpoint)['state_dict']
    assert {key: value.shape for key, value in found.items()} == expected
    assert len(found) == len(shapes)
    assert not is_official(dict(state_dict=found)) and not is_official(model.state_dict())


def test_logits_are_those_of_timms_own_loading(tmp_path):
    """timm reads the official layout as ``pretrained`` weights."""
    classes = tuple('abcdefg')
    checkpoint = official_file('tresnet_m', classes)
    torch.save(checkpoint, tmp_path / 'official.pth')
    peer = timm.create_model('tresnet_m', pretrained=True, num_classes=7, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'official.pth'), num_classes=7)).eval()
    converted = convert_official(checkpoint)
    assert converted['meta']['dataset_meta'] == dict(classes=classes)
    model = classifier('tresnet_m', 2048, 7).eval()
    missing, unexpected = model.load_state_dict(converted['state_dict'], strict=False)
    assert not unexpected and all(key.endswith('num_batches_tracked') for key in missing)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = peer(images), model(images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected)


def test_batch_norms_scale_is_inplace_abns():
    checkpoint = official_file('tresnet_m', ('a', ))
    checkpoint['model']['body.conv1.1.weight'] = torch.linspace(-1, 1, 64)
    found = convert_official(checkpoint)['state_dict']['backbone.timm_model.body.conv1.bn.weight']
    torch.testing.assert_close(found, torch.linspace(-1, 1, 64).abs() + 1e-5)


def test_the_two_layers_of_the_open_images_head_become_one():
    checkpoint = official_file('tresnet_l', ("'Cat'", 'Dog', "Dog's tail"), bottleneck=512)
    state = checkpoint['model']
    converted = convert_official(checkpoint)
    assert converted['meta']['dataset_meta']['classes'] == ('Cat', 'Dog', "Dog's tail")
    features = torch.randn(5, 2432, dtype=torch.float64)
    inner = nn.functional.linear(features, *(state[f'head.fc.embedding_generator.0.{x}'].double()
                                             for x in ('weight', 'bias')))
    expected = nn.functional.linear(inner, *(state[f'head.fc.FC.{x}'].double() for x in ('weight', 'bias')))
    found = nn.functional.linear(features.float(), *(converted['state_dict'][f'head.fc.{x}']
                                                     for x in ('weight', 'bias')))
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_names_lose_their_quotes():
    """As the Open Images file has them (issue 26 of the official repository)."""
    names = ('"""Pig\'s organ soup"""', "'Cat' ", " and melon family'", 'pentathlon"""', "Dog's tail")
    assert convert_official(official_file('tresnet_m', names))['meta']['dataset_meta']['classes'] == (
        "Pig's organ soup", 'Cat', 'and melon family', 'pentathlon', "Dog's tail")


def test_runner_loads_an_official_file_by_class_names(tmp_path):
    """Into the model and its average alike, before a training starts from it."""
    torch.save(official_file('tresnet_m', ('a', 'b', 'c')), tmp_path / 'official.pth')
    model = classifier('tresnet_m', 2048, 2)
    dataset = torch.utils.data.TensorDataset(torch.zeros(1))
    dataset.metainfo = dict(classes=('c', 'a'))
    ema = RelativeEMAHook(horizon=0.1, update_buffers=True)
    runner = Runner(model, str(tmp_path), train_dataloader=dict(batch_size=1, num_workers=0, dataset=dataset,
                                                                sampler=dict(type='DefaultSampler')),
                    optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.)), train_cfg=dict(by_epoch=True, max_epochs=1),
                    custom_hooks=[ema, AdaptCheckpointHook()], experiment_name='official', log_level='ERROR',
                    default_scope='mmpretrain', load_from=str(tmp_path / 'official.pth'))
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.call_hook('before_run')
    runner.load_or_resume()
    official = torch.load(tmp_path / 'official.pth')['model']
    for loaded in (model, ema.ema_model.module):
        torch.testing.assert_close(loaded.head.fc.weight, official['head.fc.weight'][[2, 0]])
        torch.testing.assert_close(loaded.backbone.timm_model.body.conv1.conv.weight, official['body.conv1.0.weight'])


def test_an_unknown_key_is_refused():
    checkpoint = official_file('tresnet_m', ('a', ))
    checkpoint['model']['decoder.weight'] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"\['decoder.weight'\] are not weights of a TResNet of the official"):
        convert_official(checkpoint)


# --- other classes


def test_rows_by_name():
    weight = torch.arange(6.).reshape(3, 2)
    initial = -torch.ones(4, 2, requires_grad=True)
    rows, missing = match_rows(weight, ('car', 'tv', 'cat'), ('cat', 'dog', 'tvmonitor', 'car'), initial,
                               dict(tvmonitor='tv'))
    assert rows.tolist() == [[4, 5], [-1, -1], [2, 3], [0, 1]] and missing == ['dog']
    assert not rows.requires_grad and (initial == -1).all()
    rows, missing = match_rows(weight, ('car', 'tvmonitor', 'cat'), ('tvmonitor', 'car'), initial[:2],
                               dict(tvmonitor='tv'))
    assert rows.tolist() == [[2, 3], [0, 1]] and missing == []
    rows, missing = match_rows(weight, ('car', 'cat', 'cat'), ('cat', 'car'), initial[:2])  # which cat?
    assert rows.tolist() == [[-1, -1], [0, 1]] and missing == ['cat']
    rows, missing = match_rows(weight[:, 0], ('car', 'tv', 'cat'), ('cat', 'dog'), torch.tensor([7., 8.]))
    assert rows.tolist() == [4, 8] and missing == ['dog']


class Linear(nn.Module):

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.head = nn.Module()
        self.head.fc = nn.Linear(2, rows)


def mmengine_file(classes: tuple[str, ...]) -> dict:
    rows = torch.arange(float(len(classes)))
    return dict(meta=dict(dataset_meta=dict(classes=classes)),
                state_dict={'head.fc.weight': torch.stack([2 * rows, 2 * rows + 1], 1), 'head.fc.bias': rows})


# --- reading


def test_genuine_checkpoints_are_read(tmp_path):
    """What MMEngine's own hold beside tensors, also as NumPy 1 wrote it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    schedule = OneCycleLR(optimizer, eta_max=0.1, total_steps=10)
    numbers = [np.float32(1), np.float64(2), np.int64(3), np.bool_(True), np.uint8(4), np.arange(3),
               np.ones((2, 2), 'f2')]
    content = dict(
        meta=dict(dataset_meta=ConfigDict(classes=('a', 'b'), palette=[(1, 2, 3)])), numbers=numbers,
        message_hub=dict(log_scalars=dict(loss=HistoryBuffer([1., 3.], [1, 1])),
                         runtime_info=dict(best=np.float32(0.5))),
        optimizer=optimizer.state_dict(), param_schedulers=[schedule.state_dict()], state_dict=Linear(2).state_dict())
    path = tmp_path / 'a.pth'
    torch.save(content, path)
    with ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    old = tmp_path / 'numpy1.pth'
    with ZipFile(old, 'w') as file:
        for name, part in parts.items():
            file.writestr(name, part.replace(b'numpy._core.', b'numpy.core.'))
    assert b'numpy.core.multiarray' in old.read_bytes() and b'numpy._core' not in old.read_bytes()
    for each in (path, old):
        read = read_checkpoint(each, verify=True)
        assert read['message_hub']['log_scalars']['loss'].statistics('mean') == 2
        assert read['param_schedulers'][0]['anneal_func'] == schedule.anneal_func
        assert read['meta'] == content['meta'] and read['message_hub']['runtime_info'] == dict(best=0.5)
        for one, two in zip(read['numbers'], numbers, strict=True):
            assert type(one) is type(two)
            np.testing.assert_array_equal(one, two)


def test_a_checksum_is_compared_where_asked(tmp_path):
    path = tmp_path / 'a.pth'
    torch.save(dict(state_dict=dict(w=torch.full((100, ), 1.))), path)
    content = path.read_bytes()
    weights = torch.full((100, ), 1.).numpy().tobytes()
    path.write_bytes(content.replace(weights, weights[:200] + b'\1' + weights[201:]))
    read_checkpoint(path)  # PyTorch compares none
    with pytest.raises(CheckpointError, match='a.pth is not a checkpoint or is damaged .*another checksum'):
        read_checkpoint(path, verify=True)


@pytest.mark.parametrize('content, message', [(dict(meta=1), None), ([1], 'holds a list, not a dict'),
                                              (torch.zeros(1), 'holds a Tensor, not a dict')])
def test_what_is_read_is_a_dict(tmp_path, content, message):
    torch.save(content, tmp_path / 'a.pth')
    if message is None:
        assert read_checkpoint(tmp_path / 'a.pth') == content
    else:
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path / 'a.pth')


@pytest.mark.parametrize('others, kept', [(('cat', 'dog'), dict), (('dog', 'cat'), list)],
                         ids=['of one list of names', 'of two'])
def test_metainfo_of_joined_sets_is_that_of_the_first(tmp_path, others, kept):
    """MMDetection's ConcatDataset has a list of them; its inferencer expects one."""
    first = dict(classes=('cat', 'dog'), palette=[(1, 2, 3)])
    torch.save(dict(meta=dict(dataset_meta=[first, dict(classes=others)]), state_dict={}), path := tmp_path / 'a.pth')
    metainfo = read_checkpoint(path)['meta']['dataset_meta']
    assert type(metainfo) is kept and (kept is list or metainfo == first)


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r'no such checkpoint: \S*none.pth'):
        read_checkpoint(tmp_path / 'none.pth')


# --- fit


class Head(Linear):

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.head.num_classes = rows


def test_a_checkpoint_that_fits():
    state = Head(3).state_dict()
    for model in (Head(3), nn.DataParallel(Head(3))):
        for content in (state, dict(state_dict=state), {f'module.{key}': value for key, value in state.items()}):
            check_state_dict(model, content, 'a.pth')


@pytest.mark.parametrize('content, message', [
    (mmengine_file(('a', 'b')),
     (r'a.pth does not fit the model of the config: head.fc.weight is \(2, 2\) in the checkpoint and \(3, 2\) in the '
      r'model; head.fc.bias is .* The checkpoint has 2 classes, and num_classes of the head is 3')),
    (dict(state_dict={'head.fc.weight': torch.zeros(3, 2)}), 'head.fc.bias is missing'),
    ({'stem': torch.zeros(1)}, 'head.fc.weight is missing; head.fc.bias is missing'),
    (dict(teacher={'head.fc.bias': torch.zeros(3)}, epoch=3), "Its weights are under 'teacher': save them alone")],
    ids=['classes', 'part', 'other', 'key'])
def test_a_checkpoint_that_does_not_fit(content, message):
    with pytest.raises(CheckpointError, match=message):
        check_state_dict(Head(3), content, 'a.pth')


def test_training_starts_from_what_fits_in_part():
    part = dict(state_dict={'head.fc.weight': torch.zeros(3, 2), 'head.fc.bias': torch.zeros(5)})
    check_state_dict(Head(3), part, 'a.pth', strict=False)
    with pytest.raises(CheckpointError, match=r'no weight has the same name .* It has stem, and the model has'):
        check_state_dict(Head(3), {'stem': torch.zeros(1)}, 'a.pth', strict=False)


def test_older_batch_norms_count_no_batches():
    state = nn.BatchNorm1d(2).state_dict()
    del state['num_batches_tracked']
    check_state_dict(nn.BatchNorm1d(2), state, 'a.pth')


def test_load_weights_warns_of_weights_that_the_model_lacks():
    state, model = Linear(3).state_dict(), Linear(3)
    load_weights(model, dict(state_dict=state), 'a.pth')
    assert torch.equal(model.head.fc.weight, state['head.fc.weight'])
    with pytest.warns(UserWarning, match='a.pth has 1 weights that the model of the config does not have: extra'):
        load_weights(model, dict(state, extra=torch.zeros(1)), 'a.pth')
    with pytest.raises(CheckpointError, match='head.fc.bias is missing'):
        load_weights(model, dict(list(state.items())[:1]), 'a.pth')


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'])
def test_prefixes_of_wrappers_are_removed_wherever_weights_come_in(tmp_path, prefix):
    state = Linear(3).state_dict()
    wrapped = OrderedDict((prefix + key, value) for key, value in state.items())
    wrapped._metadata = {prefix + key: value for key, value in state._metadata.items()}
    for content in (wrapped, dict(state_dict=wrapped), dict(wrapped, n_averaged=torch.tensor(3))):
        torch.save(content, tmp_path / 'a.pth')
        read = read_checkpoint(tmp_path / 'a.pth')
        assert list(state_of(read)) == list(state)
        model = Linear(3)
        load_weights(model, read, 'a.pth')
        assert torch.equal(model.head.fc.weight, state['head.fc.weight'])
        with safe_checkpoint_loading():
            model = Linear(3)
            mmengine_load(model, str(tmp_path / 'a.pth'), strict=True)
            assert torch.equal(model.head.fc.weight, state['head.fc.weight'])
            wide = nn.Module()
            wide.head = nn.Linear(2, 3)
            PretrainedInit(str(tmp_path / 'a.pth'), prefix='head.fc.')(wide.head)
            assert torch.equal(wide.head.weight, state['head.fc.weight'])
    assert 'head.fc' in strip_wrappers(wrapped)._metadata


@pytest.mark.parametrize('names', [['module.fc.lora_up'], ['module.a', 'b'], ['n_averaged'], []])
def test_names_that_start_with_module_themselves_remain(names):
    state = {name: torch.zeros(1) for name in names}
    assert strip_wrappers(state) is state


class Resized(nn.Module):
    """It renames and resizes a weight while it loads, as MMPretrain's transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(4))
        self._register_load_state_dict_pre_hook(self._adapt)

    def _adapt(self, state: dict, prefix: str, *_: object) -> None:
        old = state.pop(prefix + 'old', state.get(prefix + 'place'))
        state[prefix + 'place'] = old.repeat(2) if len(old) == 2 else old


def test_models_may_rename_and_resize_weights():
    for strict in (True, False):
        for key, size in (('place', 2), ('old', 2), ('old', 4)):
            check_state_dict(Resized(), {key: torch.ones(size)}, 'a.pth', strict)
        with pytest.raises(CheckpointError, match='does not fit'):
            check_state_dict(Resized(), {'place': torch.ones(3)}, 'a.pth', strict)


def test_few_weights_that_fit_give_a_warning(monkeypatch):
    told = []
    monkeypatch.setattr(checkpoint, 'print_log', lambda text, *_: told.append(text))
    check_state_dict(Head(3), {'head.fc.bias': torch.zeros(3)}, 'a.pth', strict=False)
    assert 'a.pth has only 1 of the 2 weights of the model (33.3% of their values)' in told.pop()
    check_state_dict(Head(3), {'head.fc.weight': torch.zeros(3, 2)}, 'a.pth', strict=False)
    assert not told


@pytest.mark.parametrize('content, key, hint', [
    (dict(model={'fc.weight': torch.zeros(1)}, epoch=3), '', "under 'model': save them alone"),
    ({'encoder.head.fc.weight': torch.zeros(3, 2)}, '', "start with 'encoder.': save them without it"),
    ({'encoder.head.fc.weight': torch.zeros(3, 2)}, 'model.init_cfg', "Set model.init_cfg.prefix='encoder.'."),
    ({'fc.weight': torch.zeros(3, 2)}, '', r'has the weights of model.head: .* model.head.init_cfg=dict\('),
    ({'other': torch.zeros(1)}, '', r'and the model has head.fc.weight, head.fc.bias.$')])
def test_how_a_file_that_does_not_fit_can_be_used(content, key, hint):
    assert re.search(hint, describe_misfit(content, Head(3).state_dict(), key))


class Pretrained(BaseModule):

    def __init__(self, init_cfg: dict) -> None:
        super().__init__(init_cfg)
        self.stem, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)


@pytest.mark.parametrize('rename, prefix, outcome', [
    ('{}', None, 'fits'), ('backbone.{}', 'backbone', 'fits'), ('backbone.{}', None, "prefix='backbone.'"),
    ('encoder.{}', None, "prefix='encoder.'"), ('{}', 'backbone.', 'has this prefix. Leave it out')])
@pytest.mark.parametrize('kind', ['Pretrained', PretrainedInit], ids=['name', 'class'])
def test_weights_of_init_cfg(tmp_path, monkeypatch, rename, prefix, outcome, kind):
    monkeypatch.chdir(tmp_path)
    torch.save({rename.format(key): value + 0.5 for key, value in Pretrained(None).state_dict().items()}, 'a.pth')
    model = Pretrained(dict(type=kind, checkpoint='a.pth', prefix=prefix))
    runner = SimpleNamespace(model=model, _resume=False, _load_from=None, iter=0)
    monkeypatch.setattr(hooks, 'built_loop', lambda *_: True)
    hook = hooks.CheckStateDictHook(strict=False)

    def start() -> None:
        hook.before_run(runner)
        model.init_weights()
        hook.before_train(runner)

    if outcome == 'fits':
        start()
        assert model.stem.bias.equal(torch.load('a.pth')[rename.format('stem.bias')]) and not hook.files
    else:
        with pytest.raises(CheckpointError, match=outcome):
            start()


def test_a_part_of_init_cfg_gives_a_warning(monkeypatch):
    told = []
    monkeypatch.setattr(checkpoint, 'print_log', lambda text, *_: told.append(text))
    model = Pretrained(dict(type='Pretrained', checkpoint='a.pth'))
    part = {'under.another.name': model.stem.weight.detach().half().float()}
    model.stem.weight.data.copy_(part['under.another.name'])
    check_pretrained(model, {'a.pth': part})
    assert re.search('only 28.6% of the weights come from a.pth. .* such as stem.bias, last.weight', told.pop())
    part['last'] = model.last.weight.detach().clone()
    check_pretrained(model, {'a.pth': part})
    assert not told


def test_resuming_needs_no_pretrained_weights(monkeypatch):
    monkeypatch.setattr(hooks, 'built_loop', lambda *_: True)
    model = nn.Sequential(Pretrained(dict(type='Pretrained', checkpoint='https://host/gone.pth')))
    hooks.CheckStateDictHook().before_run(SimpleNamespace(model=model, _resume=True))
    model[0].init_weights()


def test_lora_checkpoints_hold_a_part_of_the_model(tmp_path):
    from mmpretrain.models import LoRAModel

    def build() -> LoRAModel:
        return LoRAModel(module=dict(type='mmpretrain.VisionTransformer', img_size=16, patch_size=8, arch=dict(
            embed_dims=8, num_layers=1, num_heads=2, feedforward_channels=8)), rank=2, targets=[dict(type='qkv')])

    trained, model = build(), build()
    for parameter in trained.parameters():
        nn.init.normal_(parameter)
    torch.save(dict(state_dict=trained.state_dict()), tmp_path / 'a.pth')
    content = read_checkpoint(tmp_path / 'a.pth')
    hooks.CheckStateDictHook().after_load_checkpoint(SimpleNamespace(model=model, _load_from='a.pth'), content)
    _load_checkpoint_to_model(model, content)  # as MMEngine's Runner does after the hooks
    found, expected = model.state_dict(), trained.state_dict()
    assert len(found) == 2 and all(found[key].equal(value) for key, value in expected.items())
    assert unwrap_model(model) is model and inner_model(model) is model.module
    del content['state_dict'][next(iter(content['state_dict']))]
    with pytest.raises(CheckpointError, match='lora_down.weight is missing'):
        check_state_dict(model, dict(state_dict=dict(list(expected.items())[1:])), 'a.pth')


def test_bare_weights_are_put_where_emahook_needs_them(tmp_path):
    torch.save(Linear(3).state_dict(), tmp_path / 'a.pth')
    with safe_checkpoint_loading():
        assert set(CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'))) == {'state_dict'}
    assert 'head.fc.bias' in read_checkpoint(tmp_path / 'a.pth')


# --- the checkpoint to resume from


@pytest.fixture
def folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def save(name: str, age: float = 0, **content) -> str:
    path = Path('w', name)
    path.parent.mkdir(exist_ok=True)
    torch.save(dict(meta={}, message_hub={}, optimizer={}, state_dict={'w': torch.zeros(100)}) | content, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return str(path)


def record(text: str) -> None:
    Path('w').mkdir(exist_ok=True)
    Path('w/last_checkpoint').write_text(text)


def damage(path: str, how: str) -> None:
    content = Path(path).read_bytes()
    if how == 'torn':
        content = content[:len(content) // 2]
    elif how == 'flipped':  # one bit of a weight, which PyTorch would load
        at = content.index(bytes(400))
        content = content[:at + 100] + b'\x01' + content[at + 101:]
    else:
        content = b''
    Path(path).write_bytes(content)


@pytest.mark.usefixtures('folder')
@pytest.mark.parametrize('text', ['w/epoch_2.pth', '/elsewhere/epoch_2.pth\n'], ids=['in place', 'moved'])
def test_the_named_checkpoint(text):
    save('epoch_2.pth', age=10)
    save('epoch_9.pth')
    record(text)
    assert find_checkpoint('w') == (os.path.join('w', 'epoch_2.pth'), {})


@pytest.mark.usefixtures('folder')
@pytest.mark.parametrize('how', ['torn', 'flipped', 'empty'])
def test_a_damaged_checkpoint_is_passed_over(how):
    save('epoch_1.pth', age=30)
    save('epoch_2.pth', age=20)
    save('best_mAP_epoch_3.pth')
    damage(save('epoch_3.pth', age=10), how)
    record('w/epoch_3.pth')
    path, reasons = find_checkpoint('w')
    assert path == 'w/epoch_2.pth' and list(reasons) == ['w/epoch_3.pth']
    assert 'w/epoch_3.pth is not a checkpoint or is damaged' in reasons['w/epoch_3.pth']


@pytest.mark.usefixtures('folder')
@pytest.mark.parametrize('text, reasons', [
    ('', {'w/last_checkpoint': 'it is empty'}), (None, {}),
    ('w/epoch_3.pth', {'w/epoch_3.pth': 'no such checkpoint: w/epoch_3.pth. Give the path of an existing file'})],
    ids=['empty', 'missing', 'deleted'])
def test_the_record_is_wrong(text, reasons):
    save('epoch_1.pth', age=30)
    save('epoch_2.pth', age=20)
    if text is not None:
        record(text)
    assert find_checkpoint('w') == ('w/epoch_2.pth', reasons)


@pytest.mark.usefixtures('folder')
def test_checkpoints_in_a_folder_of_their_own():
    save('epoch_1.pth', age=30)
    damage(save('epoch_2.pth'), 'torn')
    Path('logs').mkdir()
    Path('logs/last_checkpoint').write_text('w/epoch_2.pth')
    assert find_checkpoint('logs')[0] == 'w/epoch_1.pth'


@pytest.mark.usefixtures('folder')
def test_nothing_to_resume():
    assert find_checkpoint('w') == (None, {})
    damage(save('epoch_1.pth'), 'torn')
    path, reasons = find_checkpoint('w')
    assert path is None and list(reasons) == ['w/epoch_1.pth']


@pytest.mark.usefixtures('folder')
def test_weights_alone_are_not_resumed():
    torch.save(dict(meta={}, state_dict={}, message_hub={}), save('epoch_1.pth'))
    path, reasons = find_checkpoint('w')
    assert path is None and 'cannot be resumed: it has no optimizer' in reasons['w/epoch_1.pth']


@pytest.mark.usefixtures('folder')
def test_checkpoints_of_deepspeed_are_folders():
    Path('w/epoch_1.pth').mkdir(parents=True)
    record('w/epoch_1.pth')
    assert find_checkpoint('w') == ('w/epoch_1.pth', {})
