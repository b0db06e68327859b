import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from mmasl.datasets.herbarium import Herbarium2020, held_out
from mmasl.errors import ConfigError, DataError

# Category id: images. The ids have gaps and are not in order; species 9 has a single specimen.
SPECIES = {40: range(100, 110), 3: range(300, 303), 9: [7]}


def content() -> dict:
    images = [(image, category) for category, found in SPECIES.items() for image in found]
    return dict(
        info=dict(year=2020), licenses=[], regions=[dict(id=1, name='America')],
        images=[dict(id=i, file_name=f'images/000/{c:02}/{i}.jpg', width=8, height=8, license=1) for i, c in images],
        annotations=[dict(id=n, image_id=i, category_id=c, region_id=1) for n, (i, c) in enumerate(images)],
        categories=[dict(id=c, name=f'species {c}', family='f', genus='g') for c in SPECIES])


@pytest.fixture
def root(tmp_path) -> Path:
    save(tmp_path, content())
    for image in content()['images']:
        path = tmp_path / image['file_name']
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(path)
    return tmp_path


def save(root: Path, data: object) -> None:
    (root / 'metadata.json').write_text(json.dumps(data))


def load(root: Path, split: str = 'all', **kwargs) -> Herbarium2020:
    return Herbarium2020(**dict(ann_file='metadata.json', data_root=str(root), split=split) | kwargs)


def labels(dataset: Herbarium2020) -> dict[int, int]:
    return {info['img_id']: info['gt_label'] for info in map(dataset.get_data_info, range(len(dataset)))}


def test_classes_are_sorted_by_category_id(root):
    dataset = load(root)
    assert dataset.CLASSES == dataset.metainfo['classes'] == ('species 3', 'species 9', 'species 40')
    assert labels(dataset) == {i: [3, 9, 40].index(c) for c, found in SPECIES.items() for i in found}
    assert dataset[0]['img_path'] == str(root / 'images' / '000' / '40' / '100.jpg')
    assert dataset.get_cat_ids(0) == [2]


@pytest.mark.parametrize('fraction, counts', [(0.1, [1, 0, 1]), (0.5, [2, 0, 5]), (0.9, [2, 0, 9])])
def test_held_out_images(root, fraction, counts):
    train, val, both = (labels(load(root, split, val_fraction=fraction)) for split in ('train', 'val', 'all'))
    assert not train.keys() & val.keys() and train | val == both
    assert np.bincount(list(val.values()), minlength=3).tolist() == counts


def test_held_out_images_are_fixed(root):
    val = labels(load(root, 'val', val_fraction=0.3))
    data = content()
    for key in ('images', 'annotations', 'categories'):
        data[key].reverse()
    save(root, data)
    assert labels(load(root, 'val', val_fraction=0.3)) == val
    # A larger part contains a smaller one, so that nobody trains on what was held out before.
    assert val.items() <= labels(load(root, 'val', val_fraction=0.5)).items()


def test_held_out_images_are_scattered():
    labels = np.repeat([0, 1], 5000)
    chosen = held_out(np.arange(10000), labels, 0.1)
    assert np.bincount(labels[chosen]).tolist() == [500, 500]
    per_hundred = chosen.reshape(100, 100).sum(1)
    assert per_hundred.min() >= 7 and per_hundred.max() <= 13
    assert len(held_out([], [], 0.1)) == 0


def test_names_that_are_not_utf8(root):
    text = (root / 'metadata.json').read_bytes().replace(b'species 9', b'species \xe9')
    (root / 'metadata.json').write_bytes(text)
    assert load(root).CLASSES == ('species 3', 'species \ufffd', 'species 40')


def test_from_a_config(root):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        dataset = DATASETS.build(dict(type='mmasl.Herbarium2020', ann_file='metadata.json', data_root=str(root),
                                      split='val', pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
    assert sorted(sample['data_samples'].gt_label.item() for sample in dataset) == [0, 2]


def test_the_evaluation_of_the_configs_keeps_no_scores():
    cfg = Config.fromfile(Path(__file__).parents[2] / 'configs/_base_/datasets/herbarium2020.py')
    assert cfg.val_evaluator == cfg.test_evaluator == dict(type='mmasl.MacroF1')


# ----------------------------------------------------------------------------------------------------------- errors

def test_missing_files(root):
    with pytest.raises(DataError, match=r'no annotation file .*other\.json.*kaggle.*digits'):
        load(root, ann_file='other.json')
    (root / 'images' / '000' / '40' / '100.jpg').unlink()
    with pytest.raises(DataError, match=r'no image .*000/40/100\.jpg.*data_root.*digits'):
        load(root)


@pytest.mark.parametrize('change, message', [
    (lambda d: d.pop('annotations'),
     r"is not a file of annotated instances: it lacks \['annotations'\] and has .* labels of the test set are private"),
    (lambda d: d['images'].append(d['images'][0]), 'lists image id 100 2 times'),
    (lambda d: d['images'][1].update(file_name='images/000/40/100.jpg'),
     "lists image file 'images/000/40/100.jpg' 2 times"),
    (lambda d: d['categories'].append(d['categories'][1]), 'lists category id 3 2 times'),
    (lambda d: d['annotations'].pop(2), 'has no annotation of 1 images, the first has the id 102'),
    (lambda d: d['annotations'].append(dict(id=99, image_id=101, category_id=3)),
     'annotates image id 101 twice, the second time as annotation 99'),
    (lambda d: d['annotations'][4].update(image_id=5), 'has the unknown image_id 5'),
    (lambda d: d['annotations'][4].update(category_id=5), 'has the unknown category_id 5'),
    (lambda d: d['annotations'][4].pop('category_id'), 'has the unknown category_id None'),
], ids=['test set', 'image twice', 'file twice', 'category twice', 'not annotated', 'annotated twice', 'unknown image',
        'unknown category', 'no category'])
def test_inconsistent_files(root, change, message):
    data = content()
    change(data)
    save(root, data)
    with pytest.raises(DataError, match=f'metadata.json {message}'):
        load(root)


def test_damaged_file(root):
    (root / 'metadata.json').write_text('{"images": [{"id"')
    with pytest.raises(DataError, match='metadata.json is not valid JSON'):
        load(root)


@pytest.mark.parametrize('kwargs, message', [
    (dict(split='test'), r"split='test' is unknown; set one of \('train', 'val', 'all'\)"),
    (dict(val_fraction=1), 'val_fraction=1 is out of range'),
    (dict(classes=('species 3', )), 'classes cannot be set'),
    (dict(metainfo=dict(classes=('species 3', ))), 'classes cannot be set'),
], ids=str)
def test_wrong_arguments(root, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        load(root, **kwargs)


def test_nothing_to_hold_out(root):
    data = content()
    data.update(images=data['images'][-1:], annotations=data['annotations'][-1:])
    save(root, data)
    with pytest.raises(DataError, match="metadata.json has no image for split='val'"):
        load(root, 'val')
