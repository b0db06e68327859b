import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.dataset import ConcatDataset
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner
from PIL import Image

from mmasl.datasets.coco import CocoMultiLabel
from mmasl.errors import ConfigError, DataError

NAMES = {18: 'dog', 90: 'toothbrush', 1: 'person', 44: 'bottle'}  # as in the file: ids with gaps and not in order


def annotation(image_id: int, category_id: int, iscrowd: int = 0, **more) -> dict:
    return dict(image_id=image_id, category_id=category_id, iscrowd=iscrowd, bbox=[0, 0, 4, 4], area=16, **more)


def content() -> dict:
    """Image 40 has no annotation, image 50 only a crowd, 'bottle' no image."""
    anns = [annotation(30, 1), annotation(30, 18), annotation(30, 1), annotation(20, 90), annotation(50, 1, iscrowd=1)]
    return dict(images=[dict(id=i, file_name=f'{i}.png', width=8, height=8) for i in (30, 20, 40, 50)],
                annotations=[dict(ann, id=i) for i, ann in enumerate(anns)],
                categories=[dict(id=i, name=name) for i, name in NAMES.items()])


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / 'images').mkdir()
    for i in (20, 30, 40, 50):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / 'images' / f'{i}.png')
    save(tmp_path, content())
    return tmp_path


def save(root: Path, data: object) -> None:
    (root / 'instances.json').write_text(json.dumps(data))


def load(root: Path, **kwargs) -> CocoMultiLabel:
    kwargs = dict(ann_file='instances.json', data_root=str(root), data_prefix=dict(img_path='images')) | kwargs
    return CocoMultiLabel(**kwargs)


def labels(dataset: CocoMultiLabel) -> list[tuple[int, list[int]]]:
    return [(info['img_id'], info['gt_label']) for info in map(dataset.get_data_info, range(len(dataset)))]


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    found = []
    for module in ('coco', 'validation'):
        monkeypatch.setattr(f'mmasl.datasets.{module}.print_log', lambda message, *_: found.append(message))
    return found


# --------------------------------------------------------------------------------------------------------- labels

def test_images_with_annotations_and_classes_in_the_files_order(root):
    dataset = load(root)
    assert dataset.CLASSES == dataset.metainfo['classes'] == ('dog', 'toothbrush', 'person', 'bottle')
    assert labels(dataset) == [(30, [0, 2]), (20, [1]), (50, [2])]
    assert dataset[0]['img_path'] == str(root / 'images' / '30.png')
    assert [dataset.get_cat_ids(i) for i in range(3)] == [[0, 2], [1], [2]]


def test_keep_empty(root):
    assert labels(load(root, keep_empty=True)) == [(30, [0, 2]), (20, [1]), (40, []), (50, [2])]


@pytest.mark.parametrize('how', [dict(metainfo=dict(classes=['person', 'dog'])), dict(classes=('person', 'dog'))],
                         ids=['metainfo', 'classes'])
def test_classes_select_and_order(root, how):
    dataset = load(root, **how)
    assert dataset.CLASSES == ('person', 'dog')
    assert labels(dataset) == [(30, [0, 1]), (50, [0])]
    assert labels(load(root, keep_empty=True, **how)) == [(30, [0, 1]), (20, []), (40, []), (50, [0])]


def test_empty_classes_are_named(root, warnings):
    load(root)
    assert warnings == [f'{root}/instances.json: 1 of 4 images have no label and are omitted',
                        f'{root}/instances.json has no image of 1 classes: bottle']
    warnings.clear()
    load(root, classes=('dog', 'person'), keep_empty=True)
    assert warnings == []


def test_other_metainfo_is_kept(root):
    assert load(root, metainfo=dict(source='x')).metainfo == dict(
        source='x', classes=('dog', 'toothbrush', 'person', 'bottle'))


# -------------------------------------------------------------------------------------------------- in the OpenMMLab

def test_lazy_init_knows_its_classes(root):
    for ask in (lambda d: d.CLASSES, lambda d: d.metainfo['classes'], lambda d: tuple(d.class_to_idx)):
        dataset = load(root, lazy_init=True)
        assert not dataset._fully_initialized
        assert ask(dataset) == ('dog', 'toothbrush', 'person', 'bottle')
        assert len(dataset) == 3


def test_lazy_init_reads_nothing_when_classes_are_given(root):
    dataset = load(root, lazy_init=True, ann_file='later.json', classes=('dog', 'person'))
    assert dataset.CLASSES == dataset.metainfo['classes'] == ('dog', 'person')
    with pytest.raises(DataError, match='later.json'):
        dataset.full_init()


def test_stock_arguments(root):
    dataset = load(root, indices=[2], serialize_data=False, test_mode=True,
                   pipeline=[dict(type='mmpretrain.LoadImageFromFile'),
                             dict(type='mmpretrain.PackInputs', meta_keys=('img_id', ))])
    sample = dataset[0]
    assert len(dataset) == 1
    assert (sample['inputs'] == 50).all()
    assert sample['data_samples'].gt_label.tolist() == [2]
    assert sample['data_samples'].img_id == 50


def test_samples_without_a_label_can_be_packed(root):
    pipeline = [dict(type='mmpretrain.LoadImageFromFile'), dict(type='mmpretrain.PackInputs')]
    sample = load(root, keep_empty=True, pipeline=pipeline)[2]['data_samples']
    assert sample.gt_label.shape == (0, )


@pytest.mark.parametrize('scope', ['mmengine', 'mmpretrain', 'mmdet'])
def test_dataloader_from_a_config(root, scope):
    config = dict(type='mmasl.CocoMultiLabel', ann_file='instances.json', data_root=str(root),
                  data_prefix=dict(img_path='images'), pipeline=[dict(type='mmpretrain.LoadImageFromFile'),
                                                                dict(type='mmpretrain.PackInputs')])
    with DefaultScope.overwrite_default_scope(scope):
        loader = Runner.build_dataloader(dict(
            batch_size=3, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'), dataset=config))
    batch = next(iter(loader))
    assert batch['inputs'].shape == (3, 3, 8, 8)
    assert [sample.gt_label.tolist() for sample in batch['data_samples']] == [[0, 2], [1], [2]]


def test_wrappers(root):
    dataset = ConcatDataset([load(root), load(root, lazy_init=True)])
    assert len(dataset) == 6 and dataset.metainfo['classes'][0] == 'dog'
    balanced = DATASETS.build(dict(type='ClassBalancedDataset', dataset=load(root), oversample_thr=0.9))
    assert len(balanced) > 3


# --------------------------------------------------------------------------------------------------------- errors

def test_missing_annotation_file(root):
    with pytest.raises(DataError, match=r'other\.json.*cocodataset\.org.*configs/digits/'):
        load(root, ann_file='other.json')


@pytest.mark.parametrize('folder, first', [('nowhere', 'nowhere/30.png'), ('images', 'images/30.png')])
def test_missing_images(root, folder, first):
    (root / 'images' / '30.png').unlink()
    with pytest.raises(DataError, match=f'no image .*{first}.*data_prefix.*digits'):
        load(root, data_prefix=dict(img_path=folder))


def test_detection_style_prefix(root):
    with pytest.raises(ConfigError, match=r"data_prefix={'img': 'images'}.*dict\(img_path=\.\.\.\)"):
        load(root, data_prefix=dict(img='images'))


@pytest.mark.parametrize('text', ['{"images": [{"id": 1}, {"i', '<html>', ''], ids=['truncated', 'html', 'nothing'])
def test_damaged_file(root, text):
    (root / 'instances.json').write_text(text)
    with pytest.raises(DataError, match='instances.json is not valid JSON .*Download instances_'):
        load(root)


@pytest.mark.parametrize('data, lacks', [
    (dict(info={}, images=[], annotations=[]), r"lacks \['categories'\] and has \['annotations', 'images', 'info'\]"),
    (dict(images=[], categories=[]), r"lacks \['annotations'\]"),
    ([1, 2], r"lacks \['annotations', 'categories', 'images'\]"),
], ids=['captions', 'image_info', 'list'])
def test_other_kinds_of_files(root, data, lacks):
    save(root, data)
    message = f'instances.json is not a file of annotated instances: it {lacks}.*Download instances_'
    with pytest.raises(DataError, match=message):
        load(root)


@pytest.mark.parametrize('key, value, message', [
    ('image_id', 77, 'Annotation 2 in .*instances.json has the unknown image_id 77'),
    ('category_id', 5, 'Annotation 2 in .*instances.json has the unknown category_id 5'),
    ('category_id', None, 'Annotation 2 in .*instances.json has the unknown category_id None'),
    ('image_id', None, 'Annotation 2 in .*instances.json has the unknown image_id None'),
])
def test_annotations_that_belong_nowhere(root, key, value, message):
    data = content()
    if value is None:
        del data['annotations'][2][key]
    else:
        data['annotations'][2][key] = value
    save(root, data)
    with pytest.raises((ConfigError, DataError), match=message):
        load(root)


@pytest.mark.parametrize('change, message', [
    (lambda data: data['images'].append(data['images'][1]), 'instances.json lists image id 20 2 times'),
    (lambda data: data['images'].append(dict(id=60, file_name='20.png')),
     "instances.json lists image file '20.png' 2 times"),
    (lambda data: data['images'][3].pop('file_name'),
     "entry 3 of images, {'id': 50, .*, has no file_name. Download"),
    (lambda data: data['categories'].append(dict(id=91, name='dog')), "categories 18 and 91 are both named 'dog'"),
    (lambda data: data['categories'].append(dict(id=18, name='cat')), 'instances.json lists category id 18 2 times'),
    (lambda data: data['annotations'].clear(), 'None of the 4 images in .*instances.json has a label.*keep_empty=True'),
], ids=['image', 'file', 'no file', 'category', 'category id', 'nothing annotated'])
def test_inconsistent_files(root, change, message):
    data = content()
    change(data)
    save(root, data)
    with pytest.raises((ConfigError, DataError), match=message):
        load(root)


@pytest.mark.parametrize('classes, message', [
    (('dog', 'hound'), r"classes \['hound'\] are not in .*instances.json; choose from \['dog', 'toothbrush'"),
    (('dog', 'person', 'dog'), "classes has 'dog' 2 times"),
    (('bottle', ), 'None of the 4 images .* has a label of the 1 classes'),
], ids=['unknown', 'twice', 'without images'])
def test_wrong_classes(root, classes, message):
    with pytest.raises((ConfigError, DataError), match=message):
        load(root, classes=classes)
