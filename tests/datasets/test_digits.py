import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.stats import chisquare

from mmasl.datasets import digits
from mmasl.datasets.coco import CocoMultiLabel
from mmasl.datasets.digits import DigitScenes, handwriting
from mmasl.errors import ConfigError, DataError, UnavailableError
from tools import make_digits

SMALL = dict(train=6, val=3)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def annotations(root: Path, split: str = 'train') -> dict:
    return json.loads((root / 'annotations' / f'instances_{split}.json').read_text())


@pytest.fixture(scope='module')
def scenes(tmp_path_factory) -> Path:
    return DigitScenes(train=30, val=10).write(tmp_path_factory.mktemp('data') / 'digits')


# ------------------------------------------------------------------------------------------------------- contents

def test_settings_alone_decide_every_byte(tmp_path):
    np.random.seed(1)
    first = contents(DigitScenes(**SMALL).write(tmp_path / 'a'))
    np.random.seed(2)
    assert contents(DigitScenes(**SMALL).write(tmp_path / 'b')) == first
    other = contents(DigitScenes(**SMALL, seed=1).write(tmp_path / 'c'))
    assert sorted(other) == sorted(first)
    assert other['train/000001.png'] != first['train/000001.png']
    assert first['train/000001.png'] != first['val/000001.png']


def test_images_do_not_depend_on_their_number(tmp_path):
    few, more = (contents(DigitScenes(train=n, val=1).write(tmp_path / str(n))) for n in (2, 4))
    assert {name for name in few if few[name] != more[name]} == {'digits.json', 'annotations/instances_train.json'}


def test_splits_have_different_handwriting(scenes):
    train, val = (np.concatenate(handwriting(split)) for split in ('train', 'val'))
    assert not set(train) & set(val)
    assert sorted([*train, *val]) == list(range(1797))
    target = digits._samples()[1]
    for split in ('train', 'val'):
        for digit, numbers in enumerate(handwriting(split)):
            assert set(target[numbers]) == {digit}
    for digit in range(10):
        share = len(handwriting('val')[digit]) / (target == digit).sum()
        assert share == pytest.approx(0.2, abs=0.01)

    for split in ('train', 'val'):
        for ann in annotations(scenes, split)['annotations']:
            assert ann['handwriting'] in handwriting(split)[(ann['category_id'] - 1) % 10]


@pytest.mark.parametrize('missing', [0.3, 1.0])
def test_missing_labels_change_nothing_but_training_annotations(tmp_path, missing):
    full = DigitScenes(train=100, val=5).write(tmp_path / 'full')
    part = DigitScenes(train=100, val=5, missing=missing).write(tmp_path / 'part')
    a, b = contents(full), contents(part)
    assert {name for name in a if a[name] != b[name]} == {'digits.json', 'annotations/instances_train.json'}
    a, b = annotations(full), annotations(part)
    assert b['images'] == a['images'] and b['categories'] == a['categories']
    kept = {ann['id']: ann for ann in b['annotations']}
    assert [ann for ann in a['annotations'] if ann['id'] in kept] == b['annotations']
    total = len(a['annotations'])
    spread = (missing * (1 - missing) / total)**0.5
    assert 1 - len(kept) / total == pytest.approx(missing, abs=4 * spread)


def test_a_larger_missing_share_leaves_out_more_of_the_same(tmp_path):
    ids = [{ann['id'] for ann in annotations(DigitScenes(train=50, val=1, missing=share).write(tmp_path / str(share)))[
        'annotations']} for share in (0.2, 0.6)]
    assert ids[1] < ids[0]


@pytest.mark.parametrize('settings', [dict(), dict(size=96, labels_per_image=4), dict(colors=8, seed=5),
                                      dict(size=32, labels_per_image=1, single=True)], ids=str)
def test_boxes_hold_all_ink_tightly_inside_the_image(settings):
    data = DigitScenes(**settings)
    for index in range(25):
        image, found = data.draw('train', index)
        assert image.shape == (data.size, data.size, 3) and image.dtype == np.uint8
        rng = np.random.default_rng([data.seed, 0, index])
        ground = digits._draw_ground(rng, data.size).round().astype(np.uint8)
        ink = (image != ground).any(2)
        inside = np.zeros_like(ink)
        for digit in found:
            x, y, w, h = digit['bbox']
            assert x >= 0 and y >= 0 and x + w <= data.size and y + h <= data.size
            box = ink[y:y + h, x:x + w]
            assert box[[0, -1]].any(1).all() and box[:, [0, -1]].any(0).all()
            inside[y:y + h, x:x + w] = True
        assert not (ink & ~inside).any()


def test_digits_of_an_image_differ_in_class_and_hardly_overlap():
    data = DigitScenes(labels_per_image=4)
    for index in range(30):
        found = data.draw('train', index)[1]
        assert len({digit['label'] for digit in found}) == len(found)
        for i, a in enumerate(found):
            for b in found[:i]:
                (ax, ay, aw, ah), (bx, by, bw, bh) = a['bbox'], b['bbox']
                common = max(0, min(ax + aw, bx + bw) - max(ax, bx)) * max(0, min(ay + ah, by + bh) - max(ay, by))
                assert common <= 0.1 * min(aw * ah, bw * bh)


def test_digits_are_of_the_set_height():
    data = DigitScenes(size=96, glyph=(20, 24))
    heights = [digit['bbox'][3] for index in range(100) for digit in data.draw('train', index)[1]]
    assert np.mean(heights) == pytest.approx(22, rel=0.1)
    assert 16 <= min(heights) and max(heights) <= 30


def test_single_digits_lie_near_the_middle():
    data = DigitScenes(single=True, labels_per_image=1)
    for index in range(50):
        found = data.draw('val', index)[1]
        assert len(found) == 1
        x, y, w, h = found[0]['bbox']
        assert abs(x + w / 2 - 32) <= 16 and abs(y + h / 2 - 32) <= 16


@pytest.mark.parametrize('mean', [1, 1.5, 2.5, 3.2, 5])
def test_labels_per_image(mean):
    data = DigitScenes(labels_per_image=mean)
    counts = [len(data.draw('train', index)[1]) for index in range(200)]
    assert min(counts) >= 1
    assert np.mean(counts) == pytest.approx(mean, abs=4 * np.std(counts) / 200**0.5)


@pytest.mark.parametrize('exponent', [0, 1])
def test_classes_follow_the_long_tail(exponent):
    data = DigitScenes(labels_per_image=1, single=True, size=32, colors=1, long_tail=exponent)
    ranked = np.arange(1, 11)**-float(exponent)
    np.testing.assert_allclose(np.sort(data.class_weights)[::-1], ranked / ranked.sum())
    labels = [data.draw('train', index)[1][0]['label'] for index in range(400)]
    counts = np.bincount(labels, minlength=10)
    assert chisquare(counts, 400 * data.class_weights).pvalue > 0.01


def test_tail_is_not_one_colour_and_depends_on_the_seed():
    tails = [set(np.argsort(DigitScenes(long_tail=1, seed=seed).class_weights)[:10]) for seed in (0, 1)]
    assert tails[0] != tails[1]
    assert len({label // 10 for label in tails[0]}) > 1


# -------------------------------------------------------------------------------------------------------- readers

def test_classes_are_digits_in_colours(scenes):
    names = [category['name'] for category in annotations(scenes)['categories']]
    assert names == [f'{color} {digit}' for color in ('red', 'green', 'blue', 'yellow') for digit in range(10)]
    assert len(DigitScenes(colors=8).classes) == 80


@pytest.mark.parametrize('split', ['train', 'val'])
def test_cocoeval_reads_the_boxes(scenes, split):
    truth = COCO(str(scenes / 'annotations' / f'instances_{split}.json'))
    boxes = [dict(image_id=ann['image_id'], category_id=ann['category_id'], bbox=ann['bbox'], score=0.9)
             for ann in truth.dataset['annotations']]
    evaluation = COCOeval(truth, truth.loadRes(boxes), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == 1


def test_coco_classes_of_both_families_agree(scenes):
    ann_file = 'annotations/instances_train.json'
    classes = tuple(DigitScenes().classes)
    boxes = CocoDataset(ann_file=ann_file, data_root=str(scenes), data_prefix=dict(img='train'),
                        metainfo=dict(classes=classes), pipeline=[])
    labels = CocoMultiLabel(ann_file, data_root=str(scenes), data_prefix=dict(img_path='train'))
    assert len(boxes) == len(labels) == 30
    assert labels.CLASSES == classes
    for box, label, index in zip(boxes, labels, range(30)):
        assert box['img_path'] == label['img_path'] == str(scenes / 'train' / f'{index + 1:06d}.png')
        image, found = DigitScenes().draw('train', index)
        np.testing.assert_array_equal(cv2.imread(label['img_path'])[..., ::-1], image)
        assert label['gt_label'] == sorted(digit['label'] for digit in found)
        assert [instance['bbox_label'] for instance in box['instances']] == [digit['label'] for digit in found]
        for instance, digit in zip(box['instances'], found):
            x, y, w, h = digit['bbox']
            assert instance['bbox'] == [x, y, x + w, y + h]
            assert instance['ignore_flag'] == 0


# -------------------------------------------------------------------------------------------------------- writing

def test_same_settings_are_left_alone(tmp_path, monkeypatch):
    root = DigitScenes(**SMALL).write(tmp_path / 'digits')
    before = contents(root)
    monkeypatch.setattr(DigitScenes, 'draw', None)
    assert DigitScenes(**SMALL).write(root, overwrite=True) == root
    assert contents(root) == before


def test_other_settings_need_overwrite(tmp_path):
    root = DigitScenes(**SMALL).write(tmp_path / 'digits')
    before = contents(root)
    with pytest.raises(DataError, match=r'digits with seed 0 \(requested: 7\).*another folder.*--overwrite'):
        DigitScenes(**SMALL, seed=7).write(root)
    assert contents(root) == before
    DigitScenes(**SMALL, seed=7).write(root, overwrite=True)
    assert contents(root) == contents(DigitScenes(**SMALL, seed=7).write(tmp_path / 'fresh'))


def test_foreign_files_are_never_touched(tmp_path):
    (tmp_path / 'photo.jpg').write_bytes(b'mine')
    with pytest.raises(DataError, match='other files.*folder of their own'):
        DigitScenes(**SMALL).write(tmp_path, overwrite=True)
    assert contents(tmp_path) == {'photo.jpg': b'mine'}


def test_an_empty_folder_is_filled(tmp_path):
    DigitScenes(**SMALL).write(tmp_path)
    assert len(list((tmp_path / 'train').iterdir())) == 6


@pytest.mark.parametrize('kind', ['interrupted', 'disk full'])
def test_an_unfinished_run_leaves_nothing(tmp_path, monkeypatch, kind):
    def imwrite(path, *_):
        if '000004' not in path:
            return True
        if kind == 'interrupted':
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr(cv2, 'imwrite', imwrite)
    with pytest.raises(KeyboardInterrupt if kind == 'interrupted' else OSError,
                       match=None if kind == 'interrupted' else '000004.png cannot be written'):
        DigitScenes(**SMALL).write(tmp_path / 'new' / 'digits')
    assert list((tmp_path / 'new').iterdir()) == []


@pytest.mark.parametrize('settings, message', [
    (dict(train=0), r'train is 0; it must be >= 1'),
    (dict(val=0), r'val is 0; it must be >= 1'),
    (dict(colors=9), r'colors is 9; it must be 1 to 8'),
    (dict(colors=0), r'colors is 0; it must be 1 to 8'),
    (dict(glyph=(24, 14)), r'glyph is \(24, 14\).*the smaller first'),
    (dict(glyph=(4, 14)), r'glyph is \(4, 14\).*from 8'),
    (dict(size=30), r'glyph is \(14, 24\).*0.75 of the image size 30'),
    (dict(labels_per_image=0.5), r'labels_per_image is 0.5; it must be >= 1'),
    (dict(labels_per_image=20), r'labels_per_image is 20; it must be lower.*up to 39 digits do not fit'),
    (dict(labels_per_image=5.1), r'labels_per_image is 5.1; .*up to 10 digits do not fit'),
    (dict(labels_per_image=6, colors=1, size=128), r'labels_per_image is 6; .*up to 11 digits do not fit'),
    (dict(single=True), r'labels_per_image is 2.5; it must be 1 with single=True'),
    (dict(long_tail=-1), r'long_tail is -1; it must be 0 to 5'),
    (dict(missing=30), r'missing is 30; it must be a share from 0 to 1'),
    (dict(seed=-1), r'seed is -1; it must be >= 0'),
], ids=str)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        DigitScenes(**settings)


def test_unknown_split():
    with pytest.raises(ConfigError, match="split='test' is unknown; set one of"):
        DigitScenes().draw('test', 0)


def test_scikit_learn_is_asked_for(monkeypatch):
    digits._samples.cache_clear()
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(UnavailableError, match=r'scikit-learn.*pip install "mmasl\[demo\]"'):
        digits._samples()


# ----------------------------------------------------------------------------------------------------------- tool

def test_tool_writes_what_the_class_writes(tmp_path, capsys):
    flags = ('--train 4 --val 2 --colors 2 --size 48 --glyph 12 20 --labels-per-image 1.5 --long-tail 0.5 '
             '--missing 0.4 --seed 3').split()
    make_digits.main([str(tmp_path / 'tool'), *flags])
    assert '4 + 2 images, 20 classes' in capsys.readouterr().out
    DigitScenes(train=4, val=2, colors=2, size=48, glyph=(12, 20), labels_per_image=1.5, long_tail=0.5, missing=0.4,
                seed=3).write(tmp_path / 'class')
    assert contents(tmp_path / 'tool') == contents(tmp_path / 'class')


def test_tool_single(tmp_path):
    make_digits.main([str(tmp_path / 'a'), '--single', '--train', '5', '--val', '1'])
    assert [ann['image_id'] for ann in annotations(tmp_path / 'a')['annotations']] == [1, 2, 3, 4, 5]


def test_tool_asks_before_it_replaces(tmp_path):
    root, counts = str(tmp_path / 'a'), ['--train', '2', '--val', '1']
    make_digits.main([root, *counts])
    with pytest.raises(SystemExit, match=r'seed 0 \(requested: 1\).*--overwrite'):
        make_digits.main([root, *counts, '--seed', '1'])
    make_digits.main([root, *counts, '--seed', '1', '--overwrite'])
    assert json.loads((tmp_path / 'a' / 'digits.json').read_text())['seed'] == 1


def test_tool_refuses_settings_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match='^colors is 12; it must be 1 to 8.$'):
        make_digits.main([str(tmp_path / 'a'), '--colors', '12'])
