"""AdaptCheckpointHook: classes by name, in fake and real runners."""
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import BaseLoop, Runner
from torch import nn

from mmasl.engine.hooks.checkpoint import AdaptCheckpointHook, CheckStateDictHook
from mmasl.errors import CheckpointError, ConfigError
from mmasl.utils.checkpoint import match_rows

ROOT = Path(__file__).parents[3]


class Linear(nn.Module):

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.head = nn.Module()
        self.head.fc = nn.Linear(2, rows)


def mmengine_file(classes: tuple[str, ...]) -> dict:
    rows = torch.arange(float(len(classes)))
    return dict(meta=dict(dataset_meta=dict(classes=classes)),
                state_dict={'head.fc.weight': torch.stack([2 * rows, 2 * rows + 1], 1), 'head.fc.bias': rows})


def fake_runner(model: nn.Module, classes: tuple[str, ...], resume: bool = False,
                training: bool = True) -> SimpleNamespace:
    dataset = torch.utils.data.TensorDataset(torch.zeros(1))
    dataset.metainfo = dict(classes=classes)

    class Loop(BaseLoop):

        def run(self):
            pass

    runner = SimpleNamespace(model=model, hooks=[], _resume=resume, _load_from='a.pth', _val_loop=None,
                             _test_loop=dict(), _train_loop=dict())
    setattr(runner, '_train_loop' if training else '_test_loop', Loop(runner, torch.utils.data.DataLoader(dataset)))
    return runner


def coco_classes() -> tuple[str, ...]:
    from mmdet.datasets import CocoDataset
    return CocoDataset.METAINFO['classes']


def adapting_hook(config: str) -> ConfigDict:
    return next(hook for hook in Config.fromfile(next(ROOT.glob(f'configs/**/{config}.py'))).custom_hooks
                if hook.type == 'mmasl.AdaptCheckpointHook')


@pytest.mark.parametrize('config', ['tresnet-l_paper_asl_voc-from-coco', 'tresnet-l_paper_bce_voc-from-coco',
                                    'tresnet-l_paper_focal_voc-from-coco', 'resnet101_asl_voc-from-coco'])
def test_vocs_20_classes_are_among_cocos_80(config):
    from mmpretrain.datasets import VOC
    classes, source = VOC.METAINFO['classes'], coco_classes()
    aliases = adapting_hook(config).aliases
    rows, missing = match_rows(torch.arange(80), source, classes, torch.full((20, ), -1), aliases)
    assert missing == []
    pairs = {name: source[row] for name, row in zip(classes, rows.tolist())}
    assert {name: other for name, other in pairs.items() if name != other} == dict(
        aeroplane='airplane', diningtable='dining table', motorbike='motorcycle', pottedplant='potted plant',
        sofa='couch', tvmonitor='tv')


def adapt(checkpoint: dict, model: nn.Module, classes: tuple[str, ...], resume: bool = False, training: bool = True,
          **kwargs) -> dict:
    AdaptCheckpointHook(**kwargs).after_load_checkpoint(fake_runner(model, classes, resume, training), checkpoint)
    return checkpoint


def test_hook_matches_the_head(monkeypatch):
    logged = []
    monkeypatch.setattr('mmasl.engine.hooks.checkpoint.print_log', lambda message, *_: logged.append(message))
    model = Linear(3)
    state = adapt(mmengine_file(('a', 'b', 'c', 'd')), model, ('d', 'x', 'q'), aliases=dict(q='b'))['state_dict']
    model.load_state_dict(before := dict(state))
    assert state['head.fc.bias'][[0, 2]].tolist() == [3, 1]
    assert before['head.fc.weight'][[0, 2]].tolist() == [[6, 7], [2, 3]]
    assert logged == ['1 of 3 classes are not in the checkpoint and start from initial weights: x']


@pytest.mark.parametrize('start', [0, 1], ids=['same', 'other order'])
def test_a_checkpoint_trained_with_aliases_keeps_all_its_rows(start):
    """It has the names of the data set, not those of the file that its training started from."""
    from mmpretrain.datasets import VOC
    classes = VOC.METAINFO['classes']
    aliases = adapting_hook('tresnet-l_paper_asl_voc-from-coco').aliases
    trained = classes[start:] + classes[:start]
    state = adapt(mmengine_file(trained), Linear(20), classes, aliases=aliases)['state_dict']
    assert state['head.fc.bias'].tolist() == [trained.index(name) for name in classes]


def test_a_test_of_classes_that_the_checkpoint_lacks_is_refused():
    """Their rows would be random, in weights that fit."""
    names = tuple('abcdefghijklm')
    message = (r"a.pth cannot be tested: 12 of 13 classes are not in the checkpoint: 'b', 'c', .*'k', \.\.\.; it has "
               r"'B', .*'K', \.\.\. that the data set lacks. Use the config .* aliases of .* set by_name=False there")
    with pytest.raises(CheckpointError, match=message):
        adapt(mmengine_file(('a', *map(str.upper, names[1:]))), Linear(13), names, training=False)
    with pytest.raises(CheckpointError, match="1 of 2 classes .*: 'b'; it has none that the data set lacks. Use"):
        adapt(mmengine_file(('a', )), Linear(2), ('a', 'b'), training=False)
    state = adapt(mmengine_file(('a', 'B', 'c')), Linear(2), ('c', 'b'), training=False, aliases=dict(b='B'))
    assert state['state_dict']['head.fc.bias'].tolist() == [2, 1]


@pytest.mark.parametrize('classes, strict, outcome', [
    ('acb', True, 'refused'), ('acb', False, "class 1 is 'b' in a.pth and 'c' in the data set, and 'b', 'c' are at"),
    ('bxy', True, 'refused'), ('axy', True, "class 1 is 'b' in a.pth and 'x' in the data set. The head keeps"),
    ('abc', True, ''), ('aac', True, "class 1 is 'b' in a.pth and 'a' in the data set. The head keeps")])
def test_classes_at_another_place_without_the_hook(classes, strict, outcome, monkeypatch):
    """A test of them would count the labels of other classes. Names that differ may be synonyms."""
    logged = []
    monkeypatch.setattr('mmasl.engine.hooks.checkpoint.print_log', lambda message, *_: logged.append(message))
    runner, hook = fake_runner(Linear(3), tuple(classes), training=False), CheckStateDictHook(strict)
    if outcome == 'refused':
        with pytest.raises(CheckpointError, match='other place. Add .*AdaptCheckpointHook'):
            hook.after_load_checkpoint(runner, mmengine_file(tuple('abc')))
        for known in ('language_model', 'hook', 'resume'):
            runner = fake_runner(Linear(3), tuple(classes), resume=known == 'resume', training=False)
            if known == 'hook':
                runner.hooks = [AdaptCheckpointHook()]
            elif known == 'language_model':
                runner.model.language_model = nn.Identity()
            hook.after_load_checkpoint(runner, mmengine_file(tuple('abc')))
    else:
        hook.after_load_checkpoint(runner, mmengine_file(tuple('abc')))
        assert len(logged) == bool(outcome) and all(text.startswith(outcome) for text in logged)


HEADS = {'Query2Label': (dict(type='mmasl.Query2LabelHead', embed_dims=8, num_heads=2, feedforward_channels=8),
                         'head.queries'),
         'ML-Decoder, a query a class': (dict(type='mmasl.MLDecoderHead', embed_dims=8, num_heads=2,
                                              feedforward_channels=8), 'head.queries'),
         'ML-Decoder, groups': (dict(type='mmasl.MLDecoderHead', embed_dims=8, num_heads=2, feedforward_channels=8,
                                     num_groups=2), 'head.fc.weight')}


@pytest.mark.parametrize('name', HEADS)
def test_heads_that_are_more_than_linear_are_not_sorted_by_half(name, monkeypatch):
    logged = []
    monkeypatch.setattr('mmasl.engine.hooks.checkpoint.print_log', lambda message, *_: logged.append(message))
    settings, key = HEADS[name]
    model = nn.Module()
    model.head = MODELS.build(dict(settings, num_classes=5, in_channels=4, loss=dict(type='mmasl.AsymmetricLoss')))
    names = tuple('abcde')
    checkpoint = dict(meta=dict(dataset_meta=dict(classes=names)), state_dict=model.state_dict())
    before = dict(checkpoint['state_dict'])
    with pytest.raises(CheckpointError, match=f'a.pth has other classes .* and {key} has per-class parameters'):
        adapt(checkpoint, model, names[::-1], training=False)
    adapt(checkpoint, model, names[::-1])
    assert len(logged) == 1 and 'starts in the order of the checkpoint' in logged[0]
    adapt(checkpoint, model, names, training=False)
    assert all(checkpoint['state_dict'][name] is value for name, value in before.items())


def test_a_head_that_knows_its_classes_by_their_texts_alone_takes_any():
    def build(count):
        model = nn.Module()
        model.head = MODELS.build(dict(
            HEADS['ML-Decoder, groups'][0], num_groups=None, num_classes=count, in_channels=4,
            label_embeddings=torch.eye(5)[:count].tolist(), loss=dict(type='mmasl.AsymmetricLoss')))
        return model

    checkpoint = dict(meta=dict(dataset_meta=dict(classes=tuple('abcde'))), state_dict=build(5).state_dict())
    kept = dict(checkpoint['state_dict'])
    adapt(checkpoint, build(3), tuple('xyz'), training=False)
    assert all(checkpoint['state_dict'][name] is value for name, value in kept.items())


@pytest.mark.parametrize('training', [False, True], ids=['test', 'training'])
def test_rows_in_their_order(training):
    state = adapt(mmengine_file(('a', 'B', 'b')), Linear(3), ('a', 'b', 'c'), training=training, by_name=False)
    assert state['state_dict']['head.fc.bias'].tolist() == [0, 1, 2]
    with pytest.raises(CheckpointError, match='a.pth has 2 classes and the data set 3. by_name=False of Adapt'):
        adapt(mmengine_file(('a', 'B')), Linear(3), ('a', 'b', 'c'), training=training, by_name=False)


def test_the_option_of_the_document_reaches_the_hook():
    option = 'custom_hooks.1.by_name=False'
    assert option in (ROOT / 'docs/recipes.md').read_text()
    cfg = Config.fromfile(ROOT / 'configs/open_images/tresnet-l_paper_asl_open-images-448.py')
    cfg.merge_from_dict({'custom_hooks.1.by_name': False})
    assert cfg.custom_hooks[1].type == 'mmasl.AdaptCheckpointHook'
    assert HOOKS.build(cfg.custom_hooks[1]).by_name is False


def test_hook_sorts_the_same_classes_in_another_order():
    state = adapt(mmengine_file(('a', 'b')), Linear(2), ('b', 'a'))['state_dict']
    assert state['head.fc.bias'].tolist() == [1, 0]


@pytest.mark.parametrize('classes, resume', [(('a', 'b'), False), (('b', 'a'), True)], ids=['same', 'resumed'])
def test_hook_leaves_alone(classes, resume):
    checkpoint = mmengine_file(('a', 'b'))
    kept = dict(checkpoint['state_dict'])
    adapt(checkpoint, Linear(2), classes, resume)
    assert all(checkpoint['state_dict'][key] is value for key, value in kept.items())


@pytest.mark.parametrize('change', [lambda c: c.pop('meta'), lambda c: c['meta'].update(dataset_meta=None),
                                    lambda c: c['state_dict'].pop('head.fc.weight')],
                         ids=['no meta', 'no classes', 'no head'])
def test_hook_without_what_it_needs(change):
    checkpoint = mmengine_file(('a', 'b'))
    change(checkpoint)
    keys = set(checkpoint['state_dict'])
    adapt(checkpoint, Linear(3), ('b', 'x', 'a'))
    assert set(checkpoint['state_dict']) == keys


def test_hook_looks_into_wrapped_models():
    wrapped = nn.DataParallel(Linear(1))
    assert adapt(mmengine_file(('a', 'b')), wrapped, ('b', ))['state_dict']['head.fc.bias'].tolist() == [1]


def test_wrong_alias():
    with pytest.raises(ConfigError, match=r"aliases of AdaptCheckpointHook has \['aeroplan'\], which are not classes"):
        adapt(mmengine_file(('a', )), Linear(1), ('aeroplane', ), aliases=dict(aeroplan='airplane'))


def test_runner_refuses_to_test_classes_that_the_checkpoint_lacks(tmp_path):
    torch.save(mmengine_file(('a', 'B')), tmp_path / 'a.pth')
    dataset = torch.utils.data.TensorDataset(torch.zeros(1))
    dataset.metainfo = dict(classes=('a', 'b'))
    runner = Runner(Linear(2), str(tmp_path), test_dataloader=dict(batch_size=1, num_workers=0, dataset=dataset,
                                                                   sampler=dict(type='DefaultSampler')),
                    test_cfg={}, test_evaluator=dict(type='mmasl.MacroF1'), custom_hooks=[AdaptCheckpointHook()],
                    experiment_name='lacking', log_level='ERROR', load_from=str(tmp_path / 'a.pth'))
    with pytest.raises(CheckpointError, match="a.pth cannot be tested: 1 of 2 classes .*: 'b'"):
        runner.test()


