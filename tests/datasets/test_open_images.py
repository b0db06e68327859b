import gzip
import io
import pickle
import tracemalloc
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import ConcatDataset
from mmengine.registry import DATASETS, METRICS, MODELS, DefaultScope
from mmpretrain.models import MultiLabelClsHead
from mmpretrain.structures import DataSample
from PIL import Image

from mmasl.datasets import open_images
from mmasl.datasets.open_images import OpenImages
from mmasl.errors import ConfigError, DataError

HEADER = 'ImageID,Source,LabelName,Confidence\n'
# Neither images nor classes are in order; /m/0zz is none of the classes, and the last image has no other label.
HUMAN = """ffb0000000000001,verification,/m/0cat,1
ffb0000000000001,crowdsource-verification,/m/0dog,0
000a000000000002,verification,/m/0sky,0
000a000000000002,verification,/m/0zz,1
000a000000000002,verification,/g/11tree,1
ffb0000000000001,verification,/m/0sky,1
0000000000000003,verification,/m/0zz,1
"""
MACHINE = """000a000000000002,machine,/m/0cat,0.7
000a000000000002,machine,/m/0sky,0.9
000a000000000002,machine,/m/0dog,0.6
0b00000000000004,machine,/m/0dog,0.7
"""
CLASSES = ['/m/0sky', '/m/0cat', '/g/11tree', '/m/0dog', '/m/0none']
FILES = {
    'human.csv': HEADER + HUMAN, 'machine.csv': HEADER + MACHINE, 'classes.txt': '\n'.join(CLASSES) + '\n',
    'names.csv': 'LabelName,DisplayName\n/m/0zz,Other\n/m/0dog,Dog\n/m/0cat,"Cat, small"\n/m/0sky,Sky\n/g/11tree,Dog\n'
                 '/m/0none,None\n'}
SKY, CAT, TREE, DOG, NONE = range(5)


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / 'train').mkdir()
    for name in ('ffb0000000000001', '000a000000000002', '0b00000000000004'):
        Image.new('RGB', (8, 8), (9, 9, 9)).save(tmp_path / 'train' / f'{name}.jpg')
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def load(root: Path, **kwargs) -> OpenImages:
    return OpenImages(**dict(ann_file='human.csv', class_file='classes.txt', unannotated='ignore', data_prefix='train',
                             data_root=str(root)) | kwargs)


def scores(dataset) -> dict[str, list[float]]:
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    for info in infos:
        assert info['gt_score'].dtype == np.float32
        assert info['gt_label'].tolist() == (info['gt_score'] == 1).nonzero()[0].tolist()
    return {info['img_id']: info['gt_score'].tolist() for info in infos}


# ---------------------------------------------------------------------------------------------------------- labels

def test_three_states(root):
    expected = {'000a000000000002': [0, -1, 1, -1, -1], 'ffb0000000000001': [1, 1, -1, 0, -1]}
    assert scores(load(root)) == expected
    negative = {name: [max(value, 0) for value in row] for name, row in expected.items()}
    assert scores(load(root, unannotated='negative')) == negative
    assert load(root)[0]['img_path'] == str(root / 'train' / '000a000000000002.jpg')
    assert load(root).get_cat_ids(1).tolist() == [SKY, CAT]


def test_machine_labels_are_positive_where_no_human_decided(root):
    assert scores(load(root, machine_file='machine.csv', min_confidence=0.7)) == {
        '000a000000000002': [0, 1, 1, -1, -1],  # a human denied the sky; the dog is below 0.7
        '0b00000000000004': [-1, -1, -1, 1, -1], 'ffb0000000000001': [1, 1, -1, 0, -1]}
    assert scores(load(root, machine_file='machine.csv'))['000a000000000002'] == [0, 1, 1, 1, -1]


def test_the_last_label_of_a_pair_counts(root):
    (root / 'human.csv').write_text(HEADER + HUMAN + '000a000000000002,verification,/m/0sky,1\n')
    assert scores(load(root))['000a000000000002'][SKY] == 1


def test_class_names(root):
    assert load(root).CLASSES == tuple(CLASSES)
    dataset = load(root, description_file='names.csv', metainfo=dict(source='x'))
    names = ('Sky', 'Cat, small', 'Dog (/g/11tree)', 'Dog (/m/0dog)', 'None')
    assert dataset.metainfo == dict(source='x', classes=names)
    (root / 'boxable.csv').write_text('/m/0dog,Dog\n/m/0sky,"Sky, blue"\n')
    dataset = load(root, class_file='boxable.csv', lazy_init=True)
    assert dataset.CLASSES == ('Dog', 'Sky, blue') and not dataset._fully_initialized
    assert scores(dataset) == {'000a000000000002': [-1, 0], 'ffb0000000000001': [0, 1]}


@pytest.mark.parametrize('text', ['ffb0000000000001\n0b00000000000004\n',
                                  'ImageID,Subset\nffb0000000000001,train\n9999999999999999,train\n'])
def test_chosen_images(root, text):
    (root / 'images.csv').write_text(text)
    dataset = load(root, image_file='images.csv')
    assert scores(dataset) == {'ffb0000000000001': [1, 1, -1, 0, -1]}


def test_columns_may_stand_in_another_order(root):
    (root / 'human.csv').write_text('Confidence,LabelName,Rotation,ImageID\r\n1,/m/0dog,,000a000000000002\r\n')
    assert scores(load(root)) == {'000a000000000002': [-1, -1, -1, 1, -1]}


def test_image_names(root):
    for name in ('0', 'f'):
        (root / f'train_{name}').symlink_to(root / 'train')
    dataset = load(root, data_prefix='', img_name='train_{id[0]}/{id}.jpg')
    assert dataset[1]['img_path'] == str(root / 'train_f' / 'ffb0000000000001.jpg')


@pytest.mark.parametrize('lines', [1, 2, 3, 10**6])
def test_against_a_dict_in_parts_of_any_size(root, monkeypatch, lines):
    monkeypatch.setattr(open_images, 'LINES', lines)
    rng = np.random.default_rng(0)
    classes = [f'/m/{i:0{1 + i % 4}}' for i in range(1, 40)]
    rows = [(f'{image:016x}', classes[c], value) for image in rng.integers(2**64, size=30, dtype=np.uint64)
            for c, value in zip(rng.permutation(39)[:rng.integers(1, 5)], rng.integers(2, size=5))]
    rows = [rows[i] for i in rng.permutation(len(rows))] if lines % 2 else rows
    expected = {}
    for image, name, value in rows:
        expected.setdefault(image, [-1] * 39)[classes.index(name)] = value
    (root / 'human.csv').write_text(HEADER + ''.join(f'{i},x,{n},{v}\n' for i, n, v in rows))
    (root / 'classes.txt').write_text('\n'.join(classes))
    first = min(expected)
    Image.new('RGB', (8, 8)).save(root / 'train' / f'{first}.jpg')
    found = scores(load(root))
    assert found == expected and list(found) == sorted(expected)


def test_memory_grows_by_bytes_and_not_by_objects(root):
    count = 20000
    (root / 'human.csv').write_text(HEADER + ''.join(
        f'{i:016x},verification,{CLASSES[c]},1\n' for i in range(count) for c in range(4)))
    Image.new('RGB', (8, 8)).save(root / 'train' / f'{0:016x}.jpg')
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        dataset = load(root)
        assert len(dataset) == count
        assert tracemalloc.get_traced_memory()[0] - before < 40 * count
    finally:
        tracemalloc.stop()


def test_spawned_workers_share_the_index(root):
    """What goes to a worker's process are handles, and both processes read the same values through them."""
    count = 5000
    (root / 'human.csv').write_text(HEADER + ''.join(
        f'{i:016x},verification,{CLASSES[c]},1\n' for i in range(count) for c in range(4)))
    Image.new('RGB', (8, 8)).save(root / 'train' / f'{0:016x}.jpg')
    dataset = load(root)
    subset, every = dataset.get_subset([7, 4999]), scores(dataset)
    sent = io.BytesIO()
    ForkingPickler(sent).dump(dataset)
    assert len(sent.getvalue()) < count < len(pickle.dumps(dataset))
    assert scores(pickle.loads(sent.getvalue())) == scores(dataset) == every
    assert scores(subset) == {name: every[name] for name in (f'{7:016x}', f'{4999:016x}')}


# --------------------------------------------------------------------------------------------------- in the OpenMMLab

def test_indices_and_subsets(root):
    dataset = load(root, machine_file='machine.csv')
    every = scores(dataset)
    for indices in (2, -1, [2, 0], 0, [1]):
        names = list(every)
        chosen = names[:indices] if indices == 2 or indices == 0 else names[-1:] if indices == -1 else [
            names[i] for i in indices]
        expected = [(name, every[name]) for name in chosen]
        assert list(scores(dataset.get_subset(indices)).items()) == expected
        assert list(scores(load(root, machine_file='machine.csv', indices=indices)).items()) == expected
    assert len(ConcatDataset([dataset, dataset.get_subset([1])])) == 4
    assert scores(pickle.loads(pickle.dumps(dataset))) == every


def test_sample_reaches_the_loss(root):
    config = dict(type='mmasl.OpenImages', ann_file='human.csv', class_file='classes.txt', unannotated='ignore',
                  data_root=str(root), data_prefix='train', pipeline=[dict(type='LoadImageFromFile'),
                                                                      dict(type='PackInputs')])
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        dataset = DATASETS.build(config)
    samples = [dataset[i]['data_samples'] for i in range(2)]
    assert samples[0].gt_label.tolist() == [TREE]
    for weight, gamma in ((0, None), (0.1, None), (1, 7)):
        head = MultiLabelClsHead(loss=dict(type='mmasl.AsymmetricLoss', ignore_index=-1, weight_unannotated=weight,
                                           gamma_unannotated=gamma))
        logits = torch.zeros(2, 5, requires_grad=True)
        head.loss((logits, ), samples)['loss'].backward()
        rest = float(weight > 0)
        assert logits.grad.sign().tolist() == [[1, rest, -1, rest, rest], [-1, -1, rest, 1, rest]]
        assert logits.grad[0, CAT] < logits.grad[0, SKY]


CONFIGS = Path(__file__).parents[2] / 'configs'


@pytest.mark.parametrize('options, weight, gamma', [
    ({}, 0.1, None), ({'weight_unannotated': 0}, 0, None), ({'weight_unannotated': 1}, 1, None),
    ({'weight_unannotated': 1, 'gamma_neg': 4, 'gamma_unannotated': 7}, 1, 7)], ids=str)
@pytest.mark.parametrize('name', ['bce', 'focal', 'asl'])
def test_treatments_of_the_configs(name, options, weight, gamma):
    """The lines of docs/recipes.md, as tools/train.py merges them."""
    cfg = Config.fromfile(CONFIGS / f'open_images/tresnet-l_paper_{name}_open-images-448.py')
    cfg.merge_from_dict({f'model.head.loss.{key}': value for key, value in options.items()})
    loss = MODELS.build(cfg.model.head.loss)
    assert (loss.ignore_index, loss.weight_unannotated) == (-1, weight)
    assert (None if loss.gamma_unannotated is None else loss.gamma_unannotated.item()) == gamma
    recipes = (CONFIGS.parent / 'docs/recipes.md').read_text()
    assert ' '.join(f'model.head.loss.{key}={value}' for key, value in options.items()) in recipes
    # The data set only marks what the loss and the metric then know.
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.unannotated == 'ignore'
    metric = METRICS.build(cfg.val_evaluator)
    assert metric.ignore_index == -1 and metric.conventions.no_negative == 'skip' and metric.score_dtype == 'float32'


def test_the_divisor_is_the_number_of_images():
    """The loss by itself divides by the number of labels, each counted by its weight."""
    cfg = Config.fromfile(CONFIGS / 'open_images/tresnet-l_paper_asl_open-images-224.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        head = MODELS.build(dict(cfg.model.head, num_classes=5, in_channels=3))
    logits = torch.linspace(-2, 2, 10).reshape(2, 5)
    for target in torch.tensor([[[1., 0, -1, -1, -1], [0, -1, -1, -1, -1]], [[1., 0, 1, 0, 1], [0, 0, 0, 1, 0]]]):
        samples = [DataSample().set_gt_score(score) for score in target]
        total = head.loss_module(logits, target, reduction_override='sum')
        torch.testing.assert_close(head._get_loss(logits, samples)['loss'], total / 2)
        annotated = (target >= 0).sum()
        torch.testing.assert_close(head.loss_module(logits, target), total / (annotated + 0.1 * (10 - annotated)))


@pytest.mark.parametrize('size', [224, 448])
@pytest.mark.parametrize('name', ['bce', 'focal', 'asl'])
def test_the_configs_train_on_human_labels(name, size):
    """As the authors did for the paper; docs/recipes.md has the option for the others."""
    cfg = Config.fromfile(CONFIGS / f'open_images/tresnet-l_paper_{name}_open-images-{size}.py')
    for split in ('train', 'val', 'test'):
        assert not cfg[f'{split}_dataloader'].dataset.get('machine_file')
    option = '--cfg-options train_dataloader.dataset.machine_file=train-annotations-machine-imagelabels.csv'
    assert option in (CONFIGS.parent / 'docs/recipes.md').read_text()
    assert 'human labels only' in (CONFIGS.parent / 'docs/scale.md').read_text()


# ------------------------------------------------------------------------------------------------------------ errors

@pytest.mark.parametrize('kwargs', [dict(ann_file='other.csv'), dict(class_file='other.csv'),
                                    dict(machine_file='other.csv'), dict(description_file='other.csv'),
                                    dict(image_file='other.csv')], ids=str)
def test_missing_files(root, kwargs):
    with pytest.raises(DataError, match=f'no file {root}/other.csv. .*openimages/web.*digits'):
        load(root, **kwargs)


def test_missing_image(root):
    (root / 'train' / '000a000000000002.jpg').unlink()
    message = 'no image .*train/000a000000000002.jpg. Correct data_prefix and img_name, or set image_file'
    with pytest.raises(DataError, match=message):
        load(root)


@pytest.mark.parametrize('file, text, message', [
    ('human.csv', 'ImageID,LabelName,XMin\n', r"lacks the columns \['Confidence'\] and has \['ImageID', 'LabelName', "),
    ('human.csv', HEADER, 'has no label. Download'),
    ('human.csv', HEADER + HUMAN + 'ffb0000000000001,verification', 'is damaged in the 8 lines from 2 on .*at row 8'),
    ('human.csv', HEADER + HUMAN + 'ffb0000000000001,verification,/m/0cat,yes', 'is damaged .*yes.* at row 7'),
    ('human.csv', HEADER + HUMAN + 'ffb0000000000001,machine,/m/0cat,0.6',
     'line 9: Confidence 0.6 is neither 1 .* Set machine_file'),
    ('human.csv', HEADER + HUMAN + 'ffb000000000000001,x,/m/0cat,1', "image id 'ffb00000000000000' is not 16 hexa"),
    ('human.csv', HEADER + 'ffb,x,/m/0cat,1', "image id 'ffb' is not 16 hexadecimal digits"),
    ('human.csv', HEADER + 'ffb000000000000x,x,/m/0cat,1', "image id 'ffb000000000000x' is not 16 hexadecimal"),
    ('human.csv', HEADER + 'ffb 00 0000000 0,x,/m/0cat,1', "image id 'ffb 00 0000000 0' is not 16 hexadecimal"),
    ('classes.txt', '/m/0cat\n/m/0dog\n/m/0cat\n', "lists class '/m/0cat' 2 times"),
    ('classes.txt', '', 'lists no class'),
    ('classes.txt', '/m/0cat\nCrème brûlée\n', "lists class 'Crème brûlée', which is not an id. .*, not names"),
    ('classes.txt', '/m/0none\n', r'No image of .*human.csv has a label of the 1 classes of .*classes.txt\.$'),
    ('names.csv', '/m/0sky,Sky\n', r"4 classes of .*classes.txt are not in .*names.csv, the first is '/m/0cat'"),
    ('images.csv', 'ffb0000000000001\nffb0000000000001\n', "lists image id 'ffb0000000000001' 2 times"),
    ('images.csv', 'ffb0000000000001.jpg\n', "image id 'ffb0000000000001.' is not 16 hexadecimal"),
    ('images.csv', 'ffb0000000000001\nffb000000000000é\n', "lists image id 'ffb000000000000é', which is not an id"),
    ('images.csv', '0000000000000000\n', 'No image .*classes.txt and is in .*images.csv'),
])
def test_damaged_files(root, file, text, message):
    (root / file).write_text(text)
    with pytest.raises(DataError, match=message) as error:
        load(root, description_file='names.csv', image_file='images.csv' if file == 'images.csv' else '')
    assert file in str(error.value)


@pytest.mark.parametrize('kwargs', [dict(class_file='packed'), dict(image_file='packed')], ids=str)
def test_compressed_lists(root, kwargs):
    (root / 'packed').write_bytes(gzip.compress('\n'.join(CLASSES).encode()))
    with pytest.raises(DataError, match=f'{root}/packed lists .* is not an id. .*unpack the file if it is compressed'):
        load(root, **kwargs)


def test_a_quote_without_its_other_end(root):
    (root / 'classes.txt').write_text('"' + '/m/0cat\n' * 2**15)
    with pytest.raises(DataError, match='classes.txt is not a CSV file .field larger than .*Download it again'):
        load(root)


def test_no_text(root):
    (root / 'human.csv').write_bytes((HEADER + HUMAN).encode() + b'\xff\xfe\n')
    with pytest.raises(DataError, match='human.csv is damaged'):
        load(root)


@pytest.mark.parametrize('kwargs, message', [
    (dict(unannotated='skip'), "unannotated='skip' is unknown; set 'ignore' or 'negative'"),
    (dict(min_confidence=0), 'min_confidence=0 is out of range'),
    (dict(classes=('Dog', )), 'classes cannot be set; OpenImages takes them from class_file'),
    (dict(metainfo=dict(classes=('Dog', ))), 'classes cannot be set; OpenImages takes them from class_file'),
], ids=str)
def test_wrong_arguments(root, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        load(root, **kwargs)
