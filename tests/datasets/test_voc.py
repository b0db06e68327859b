from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, DefaultScope
from mmpretrain.datasets import VOC
from mmpretrain.models import ClsDataPreprocessor, MultiLabelClsHead
from PIL import Image

from mmasl.datasets.voc import VOCMultiLabel
from mmasl.errors import ConfigError, DataError

CAT, DOG, PERSON = (VOC.METAINFO['classes'].index(name) for name in ('cat', 'dog', 'person'))
# Image: (class, difficult); None: no such element.
OBJECTS = {
    '000001': [('dog', 0), ('person', 1)],
    '000002': [('person', 0), ('person', 1), ('cat', 1), ('cat', 1)],
    '000003': [('dog', 1)],
    '000004': [('cat', None), ('cat', 0)],
}
PACK = [dict(type='mmpretrain.LoadImageFromFile'), dict(type='mmpretrain.PackInputs')]


def write(root: Path, objects: dict[str, list[tuple]], split: str = 'trainval') -> None:
    for folder in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / 'ImageSets' / 'Main' / f'{split}.txt').write_text('\n'.join(objects))
    for name, found in objects.items():
        Image.new('RGB', (8, 8)).save(root / 'JPEGImages' / f'{name}.jpg')
        xml = ''.join(f'<object><name>{kind}</name>' + (f'<difficult>{hard}</difficult>' if hard is not None else '') +
                      '<part><name>head</name></part></object>' for kind, hard in found)
        (root / 'Annotations' / f'{name}.xml').write_text(f'<annotation>{xml}</annotation>')


@pytest.fixture
def root(tmp_path) -> Path:
    write(tmp_path, OBJECTS)
    return tmp_path


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    found = []
    monkeypatch.setattr('mmasl.datasets.validation.print_log', lambda message, *_: found.append(message))
    return found


def infos(dataset: VOCMultiLabel, key: str) -> list:
    return [dataset.get_data_info(i)[key] for i in range(len(dataset))]


# ------------------------------------------------------------------------------------------------------ difficult

@pytest.mark.parametrize('difficult, labels', [
    ('positive', [[DOG, PERSON], [CAT, PERSON], [DOG], [CAT]]),
    ('negative', [[DOG], [PERSON], [], [CAT]]),
    ('ignore', [[DOG], [PERSON], [], [CAT]]),
])
def test_labels(root, difficult, labels):
    dataset = VOCMultiLabel(str(root), difficult=difficult)
    assert infos(dataset, 'gt_label') == labels
    assert [dataset.get_cat_ids(i) for i in range(4)] == labels
    assert infos(dataset, 'gt_label_difficult') == [[PERSON], [CAT], [DOG], []]
    assert ('gt_score' in dataset.get_data_info(0)) == (difficult == 'ignore')


def test_negative_is_the_stock_dataset(root):
    write(root, OBJECTS | {'000004': [('cat', 0)]})  # the stock class fails without <difficult>
    stock, ours = VOC(str(root)), VOCMultiLabel(str(root), difficult='negative')
    assert infos(ours, 'gt_label') == [sorted(label) for label in infos(stock, 'gt_label')]
    assert infos(ours, 'img_path') == infos(stock, 'img_path')
    assert ours.metainfo == stock.metainfo


def test_ignored_scores(root):
    scores = np.stack(infos(VOCMultiLabel(str(root), difficult='ignore'), 'gt_score'))
    expected = np.zeros((4, 20), np.float32)
    expected[[0, 1, 3], [DOG, PERSON, CAT]] = 1
    expected[[0, 1, 2], [PERSON, CAT, DOG]] = -1
    np.testing.assert_array_equal(scores, expected)
    assert scores.dtype == np.float32


def test_ignored_scores_reach_the_loss(root):
    dataset = VOCMultiLabel(str(root), difficult='ignore', pipeline=PACK)
    data = dict(inputs=[dataset[i]['inputs'] for i in range(4)],
                data_samples=[dataset[i]['data_samples'] for i in range(4)])
    samples = ClsDataPreprocessor(num_classes=20, to_onehot=True)(data)['data_samples']
    head = MultiLabelClsHead(loss=dict(type='mmasl.AsymmetricLoss', ignore_index=-1))
    logits = torch.zeros(4, 20, requires_grad=True)
    head.loss((logits, ), samples)['loss'].backward()
    ignored = torch.zeros(4, 20, dtype=torch.bool)
    ignored[[0, 1, 2], [PERSON, CAT, DOG]] = True
    assert torch.equal(logits.grad == 0, ignored)


def test_registry_and_split(root):
    write(root, {'000009': [('cat', 0)]}, 'test')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        dataset = DATASETS.build(dict(type='mmasl.VOCMultiLabel', data_root=str(root), split='test', test_mode=True,
                                      difficult='ignore', pipeline=[dict(type='LoadImageFromFile'),
                                                                    dict(type='PackInputs')]))
    assert dataset[0]['data_samples'].gt_score[CAT] == 1
    assert len(dataset) == 1


def test_without_annotations(root):
    write(root, {'000009': []}, 'test')
    dataset = VOCMultiLabel(str(root), difficult='ignore', split='test', test_mode=True,
                            data_prefix=dict(img_path='JPEGImages'))
    assert infos(dataset, 'gt_label') == [None]


# -------------------------------------------------------------------------------------------------------- classes

def test_other_classes_have_to_be_named(tmp_path, warnings):
    write(tmp_path, {'a': [('car', 0), ('tram', 0)], 'b': [('bus', 0)]})
    with pytest.raises(DataError, match=r"a\.xml has an object of class 'tram'.*metainfo=dict\(classes="):
        VOCMultiLabel(str(tmp_path), difficult='positive')
    dataset = VOCMultiLabel(str(tmp_path), difficult='positive', metainfo=dict(classes=['tram', 'bus', 'car']))
    assert infos(dataset, 'gt_label') == [[0, 2], [1]]
    assert warnings == []


def test_left_out_and_empty_classes_are_named(root, warnings):
    dataset = VOCMultiLabel(str(root), difficult='negative', classes=('dog', 'tram'))
    assert infos(dataset, 'gt_label') == [[0], [], [], []]
    listed = f'{root}/ImageSets/Main/trainval.txt'
    assert warnings == [f'{listed} has no object of 1 classes: tram',
                        f'{listed} has objects that were skipped, of 2 classes: cat, person']


def test_no_object_of_the_classes(root):
    with pytest.raises(DataError, match=r"No image of .*trainval\.txt has an object of the classes \['Dog'\]. Correct "
                                        r"metainfo.* the objects are of \['cat', 'dog', 'person'\]"):
        VOCMultiLabel(str(root), difficult='positive', classes=('Dog', ))


# --------------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize('lost, what', [('ImageSets/Main/trainval.txt', 'list of images'),
                                        ('Annotations/000001.xml', 'annotation'),
                                        ('Annotations/000003.xml', 'annotation'),
                                        ('JPEGImages/000001.jpg', 'image')])
def test_missing_files(root, lost, what):
    (root / lost).unlink()
    with pytest.raises(DataError, match=f'There is no {what} .*{lost}. data_root must contain JPEGImages/, '
                                        'Annotations/ and ImageSets/Main/.*digits'):
        VOCMultiLabel(str(root), difficult='positive')


def test_damaged_annotation(root):
    (root / 'Annotations' / '000002.xml').write_text('<annotation><obj')
    with pytest.raises(DataError, match='000002.xml is not valid XML.*Get it again'):
        VOCMultiLabel(str(root), difficult='positive')


def test_an_image_is_listed_twice(root):
    (root / 'ImageSets' / 'Main' / 'trainval.txt').write_text('000001\n000002\n000001\n')
    with pytest.raises(DataError, match="trainval.txt lists '.*000001.jpg' 2 times"):
        VOCMultiLabel(str(root), difficult='positive')


def test_difficult_is_a_flag(root):
    write(root, OBJECTS | {'000003': [('dog', 'yes')]})
    with pytest.raises(DataError, match="000003.xml has an object of class 'dog' with difficult='yes'; it must be 0"):
        VOCMultiLabel(str(root), difficult='positive')


def test_empty_list(root):
    (root / 'ImageSets' / 'Main' / 'trainval.txt').write_text('')
    with pytest.raises(DataError, match='trainval.txt lists no image'):
        VOCMultiLabel(str(root), difficult='positive')


def test_unknown_choice(root):
    with pytest.raises(ConfigError, match="difficult='skip' is unknown; set 'positive', 'negative' or 'ignore'"):
        VOCMultiLabel(str(root), difficult='skip')
