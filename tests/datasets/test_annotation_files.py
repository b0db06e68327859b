"""Files of labels as people write them: what is read, and what is refused for which purpose.

Stock behaviour is the oracle: :func:`check_coco_file` accepts what MMDetection's CocoDataset reads, and refuses or
counts what CocoDataset would drop or fail on.
"""
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mmpretrain.datasets import MultiLabelDataset
from PIL import Image

from mmasl.datasets.annotation_files import (
    BOXES,
    LABELS,
    find_voc_images,
    read_class_names,
    read_coco_file,
    read_image_set,
    read_voc_objects,
    similar_file,
)
from mmasl.datasets.coco import CocoMultiLabel
from mmasl.datasets.validation import (
    check_coco_file,
    check_evaluation_file,
    check_samples,
    check_voc_files,
    find_label_fault,
)
from mmasl.datasets.voc import VOCMultiLabel
from mmasl.errors import ConfigError, DataError, MMASLError

NAMES = ['老虎', 'dog', 'elk']


def coco() -> dict:
    return dict(images=[dict(id=i, file_name=f'{i}.jpg', width=32, height=32) for i in range(3)],
                categories=[dict(id=10 + i, name=name) for i, name in enumerate(NAMES)],
                annotations=[dict(id=i, image_id=i, category_id=10 + i, bbox=[4, 4, 12, 12], area=144, iscrowd=0)
                             for i in range(3)])


def save(content: object, encoding: str = 'utf-8') -> None:
    Path('a.json').write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path('images').mkdir()
    for i in range(3):
        Image.new('RGB', (32, 32)).save(f'images/{i}.jpg')
    save(coco())
    return tmp_path


def labels(**kwargs) -> list:
    data = CocoMultiLabel('a.json', data_prefix=dict(img_path='images'), **kwargs)
    return [data.get_data_info(i).get('gt_label') for i in range(len(data))]


def stock(classes=tuple(NAMES), **kwargs) -> list:
    """Labels and boxes as MMDetection reads them."""
    from mmdet.datasets import CocoDataset
    data = CocoDataset(ann_file='a.json', data_prefix=dict(img='images'), metainfo=dict(classes=classes), **kwargs)
    return [[(instance['bbox_label'], instance['bbox']) for instance in data.get_data_info(i)['instances']]
            for i in range(len(data))]


def check(classes=tuple(NAMES), training: bool = True) -> None:
    check_coco_file('a.json', classes, 'data', {}, training)


def update(content: dict, group: str, **values) -> dict:
    """Set keys of all entries of a list; a function gets the old value."""
    for entry in content[group]:
        for key, value in values.items():
            entry[key] = value(entry[key]) if callable(value) else value
    return content


# ----------------------------------------------------------------------------------------------------------------- COCO

@pytest.mark.parametrize('change', [
    lambda x: update(update(x, 'categories', id=float), 'annotations', category_id=float),
    lambda x: update(x, 'annotations', image_id=float),
    lambda x: update(update(x, 'images', id='a{}'.format), 'annotations', image_id='a{}'.format),
    lambda x: update(x, 'annotations', iscrowd=False),
    lambda x: update(x, 'annotations', segmentation=[[1.5, 2.5, 3.5]], score=0.25),
    lambda x: [ann.pop('iscrowd') for ann in x['annotations']],
], ids=['float categories', 'float image ids', 'text ids', 'bool crowds', 'polygons', 'no iscrowd'])
def test_what_the_stock_data_set_reads_is_read(change):
    content = coco()
    change(content)
    save(content)
    check()
    assert stock() == [[(i, [4, 4, 16, 16])] for i in range(3)]
    assert labels() == [[0], [1], [2]]


def test_an_image_file_under_several_ids(monkeypatch):
    """MMDetection trains on each entry. As labels of one image they would contradict each other."""
    said: list[str] = []
    monkeypatch.setattr('mmasl.datasets.validation.print_log', lambda words, *_: said.append(words))
    save(update(coco(), 'images', file_name='0.jpg'))
    check()
    assert len(stock()) == 3
    assert len(said) == 1 and said[0].startswith('a.json lists 1 image files under several ids (0.jpg).')
    with pytest.raises(DataError, match="a.json lists image file '0.jpg' 3 times"):
        labels()


@pytest.mark.parametrize('change, words', [
    (lambda x: [x[group].clear() for group in ('images', 'annotations')], 'a.json of data lists no images'),
    (lambda x: update(x, 'annotations', image_id=str), "unknown image_id '0' .str, but the file has ids such as 0"),
    (lambda x: update(x, 'annotations', category_id=[1]), r'unknown category_id \[1\]'),
    (lambda x: update(x, 'images', id=[1]), r'has id=\[1\], which is not a number or text'),
    (lambda x: update(x, 'images', file_name=3), 'has file_name=3, which is not the name of a file'),
    (lambda x: update(x, 'images', width='32'), "has width='32', which is not a number of pixels"),
    (lambda x: update(x, 'categories', name=None), 'has name=None, which is not a name'),
    (lambda x: update(x, 'annotations', bbox=['4', '4', '12', '12']), r'Annotation 0 .* has bbox=.*x, y, width, heig'),
    (lambda x: update(x, 'annotations', area='144'), "has area='144', which is not .*Add area=144, its width"),
    (lambda x: [ann.pop('area') for ann in x['annotations']], 'Annotation 0 in a.json has no area. Add area=144'),
    (lambda x: update(x, 'annotations', iscrowd='0'), "has iscrowd='0', which is not 0 or 1"),
    (lambda x: x.update(images=3), 'images is not a list'),
    (lambda x: x.update(images=[3]), 'entry 0 of images, 3, is not a dict'),
    (lambda x: update(x, 'annotations', bbox=[.1, .1, .5, .5]), 'None of the 3 boxes .* narrower than a pixel'),
    (lambda x: x.pop('annotations'), r"lacks \['annotations'\]"),
    (lambda x: x.update(annotations=[]), 'None of the 0 boxes'),
    (lambda x: x['categories'].append(dict(id=0, name='dog')), "categories 11 and 0 are both named 'dog'"),
], ids=lambda x: '' if callable(x) else x[:30])
def test_what_it_would_fail_on_or_drop_is_refused(change, words):
    content = coco()
    change(content)
    save(content)
    with pytest.raises(DataError, match=words):
        check()


def test_what_evaluation_needs_and_prediction_does_not():
    content = update(coco(), 'annotations', iscrowd=None)
    save(content)
    check()
    with pytest.raises(DataError, match='entry 0 of annotations, .* iscrowd=None, which is not 0 or 1. pycocotools'):
        check_evaluation_file('a.json', 'val_evaluator')
    for crowd in (0, False, 1):
        save(update(content, 'annotations', iscrowd=crowd))
        check_evaluation_file('a.json', 'val_evaluator')
    for group, key in (('images', 'image_id'), ('categories', 'category_id')):
        mixed = update(coco(), 'annotations', **{key: lambda value: str(value) if value in (2, 12) else value})
        mixed[group][2]['id'] = str(mixed[group][2]['id'])
        save(mixed)
        check()
        with pytest.raises(DataError, match=f'has numbers and texts as ids of {group}, which pycocotools cannot sort'):
            check_evaluation_file('a.json', 'val_evaluator')
    del content['annotations']
    save(content)
    check(training=False)
    assert stock(test_mode=True) == [[], [], []]
    assert labels(test_mode=True) == [None] * 3
    with pytest.raises(DataError, match='has no annotations, so nothing can be evaluated.* format_only=True'):
        check_evaluation_file('a.json', 'val_evaluator')
    with pytest.raises(DataError, match=r"lacks \['annotations'\]"):
        labels()


def test_ignored_annotations_and_those_outside_need_no_area():
    content = coco()
    content['annotations'] += [dict(id=7, image_id=0, category_id=10, ignore=1),
                               dict(id=8, image_id=0, category_id=10, bbox=[40, 4, 12, 12])]
    save(content)
    check()
    assert stock() == [[(i, [4, 4, 16, 16])] for i in range(3)]


@pytest.mark.parametrize('box, reaches', [([20, 20, 28, 28], True), ([20, 20, 12.6, 12], False),
                                          ([-1, -1, 34, 34], False), ([-4, 4, 12, 12], True)])
def test_boxes_that_reach_beyond_their_image_are_counted(box, reaches, monkeypatch):
    said = []
    monkeypatch.setattr('mmasl.datasets.validation.print_log', lambda message, *_: said.append(message))
    save(update(coco(), 'annotations', bbox=box))
    check()
    assert bool(said) == reaches
    assert all('3 of 3 boxes in a.json are reaching beyond their image (annotations 0, 1, 2)' in x for x in said)


def test_names_that_are_numbers():
    save(dict(coco(), categories=[dict(id=10, name=0), dict(id=11, name=1), dict(id=12, name=2.5)]))
    assert CocoMultiLabel('a.json', data_prefix=dict(img_path='images')).CLASSES == ('0', '1', '2.5')
    assert labels(classes=[1, '0']) == [[1], [0]]
    check((0, 1, 2.5))
    assert [[label for label, _ in found] for found in stock((0, 1, 2.5))] == [[0], [1], [2]]
    with pytest.raises(DataError, match="are not in a.json: '0', '1'.* in its order: 0, 1, 2.5"):
        check(('0', '1'))


def test_two_categories_of_one_name():
    content = coco()
    content['categories'].append(dict(id=0, name='dog'))
    save(content)
    with pytest.raises(DataError, match="categories 11 and 0 are both named 'dog'"):
        labels()
    assert labels(classes=['elk', '老虎']) == [[1], [0]], 'a name that is not selected may be repeated'
    check(('老虎', 'elk'))
    assert [[label for label, _ in found] for found in stock(('老虎', 'elk'))] == [[0], [], [1]]


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'gbk'])
def test_encodings(encoding):
    save(coco(), encoding)
    if encoding == 'gbk':
        with pytest.raises(DataError, match='entry 0 of categories.* has a name that is not UTF-8'):
            labels()
    else:
        assert labels(classes=NAMES) == [[0], [1], [2]]
    if encoding == 'utf-8':
        check()
    else:  # pycocotools fails
        with pytest.raises(DataError, match='byte order mark|not in the encoding (?i:utf-8)'):
            check()
        with pytest.raises(ValueError, match='decode|BOM'):
            stock()


def test_bytes_that_are_no_names_may_be_wrong():
    Path('a.json').write_bytes(json.dumps(dict(coco(), info='ä'), ensure_ascii=False).encode('utf-8').replace(
        'ä'.encode(), b'\xe4'))
    assert labels() == [[0], [1], [2]]
    assert read_coco_file('a.json', '', LABELS)['info'] == '\ufffd'
    with pytest.raises(DataError, match='not in the encoding'):
        read_coco_file('a.json', '', BOXES)


def test_damaged_files():
    for text in ('[' * 100000, '{"images": ', 'null', '"text"'):
        Path('a.json').write_text(text)
        with pytest.raises(DataError, match='a.json is not'):
            labels()


# ---------------------------------------------------------------------------------------------------------- class names

@pytest.mark.parametrize('content, words', [
    (b'cat\n\ndog\n', 'classes.txt of x has an empty line 2'), (b'\n\n', 'empty line 1'),
    (b'\xef\xbb\xbfcat\n', 'starts with a byte order mark'), ('老虎\n'.encode('gbk'), 'is not UTF-8'),
    (b'cat\ncat\n', "classes.txt of x has 'cat' 2 times")])
def test_lists_in_files(content, words):
    Path('classes.txt').write_bytes(content)
    with pytest.raises(MMASLError, match=words):
        read_class_names('classes.txt', 'x')


def test_empty_lines_at_the_end_are_no_classes():
    """MMEngine has a class without a name for each."""
    Path('classes.txt').write_text('老虎\ndog\nelk\n\n \n')
    assert read_class_names('classes.txt', 'x') == NAMES
    assert labels(metainfo=dict(classes='classes.txt')) == labels(classes='classes.txt') == [[0], [1], [2]]


@pytest.mark.parametrize('classes, words', [
    ('cat', r"x='cat' is a string, but no file has this name. Write \['cat'\]"), (3, 'x=3 is not a list'),
    ({'cat'}, 'is not a list'), (['cat', ''], "x has the class ''"), ([['cat']], r"x has the class \['cat'\]"),
    (['1', 1], "x has '1' 2 times"), (b'cat', 'is not a list')])
def test_settings_that_are_no_lists(classes, words):
    with pytest.raises(ConfigError, match=words):
        read_class_names(classes, 'x')


def test_lists_reach_the_data_sets():
    Path('classes.txt').write_bytes('elk\r\n老虎'.encode())
    assert read_class_names('classes.txt', 'x') == ['elk', '老虎']
    for how in (dict(classes='classes.txt'), dict(metainfo=dict(classes='classes.txt'))):
        assert labels(**how) == [[1], [0]]
    assert labels(metainfo=dict(classes=None)) == labels(metainfo=None, classes=None) == [[0], [1], [2]]
    for how in (dict(classes='elk'), dict(metainfo=dict(classes='elk'))):
        with pytest.raises(ConfigError, match="classes='elk' is a string"):
            labels(**how)


# ------------------------------------------------------------------------------------------------------------------ VOC

def voc(listed: bytes = b'0\n1\n', xml: str = '<name>{}</name>', encoding: str = '', suffix: str = '.jpg') -> list:
    for place in ('voc/ImageSets/Main', 'voc/Annotations', 'voc/JPEGImages'):
        Path(place).mkdir(parents=True, exist_ok=True)
    Path('voc/ImageSets/Main/trainval.txt').write_bytes(listed)
    for i, name in enumerate(('老虎', 'dog')):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(f'voc/JPEGImages/{i}{suffix}')
        text = f'<annotation><object>{xml.format(name)}</object></annotation>'
        text = f'<?xml version="1.0" encoding="{encoding}"?>{text}' if encoding else text
        Path(f'voc/Annotations/{i}.xml').write_bytes(text.encode(encoding or 'utf-8'))
    data = VOCMultiLabel('voc', difficult='ignore', metainfo=dict(classes=NAMES))
    assert all(Path(data.get_data_info(i)['img_path']).is_file() for i in range(len(data)))
    return [data.get_data_info(i)['gt_label'] for i in range(len(data))]


@pytest.mark.parametrize('kwargs', [
    dict(listed=b'0\n1\n\n'), dict(listed=b'0\r\n1\r\n'), dict(listed=b'0 \n 1\n'), dict(listed=b'0  1\n1 -1\n'),
    dict(listed=b'\xef\xbb\xbf0\n1'), dict(xml='<name> {} </name>'), dict(xml='<name>{}</name><difficult/>'),
    dict(xml='<name>{}</name><difficult> 0 </difficult>'), dict(encoding='gb2312'), dict(encoding='utf-16'),
    dict(suffix='.png'), dict(suffix='.JPG'), dict(suffix='.bmp')], ids=str)
def test_voc_as_people_write_it(kwargs):
    assert voc(**kwargs) == [[0], [1]]


@pytest.mark.parametrize('kwargs, words', [
    (dict(xml='<name>{}</name><difficult>Unspecified</difficult>'), "difficult='Unspecified'; it must be 0 or 1"),
    (dict(xml='<name/>'), 'voc/Annotations/0.xml has an object without a name'),
    (dict(xml='<name>&{};</name>'), '0.xml is not valid XML'), (dict(listed='老虎\n'.encode('gbk')), 'is not UTF-8'),
    (dict(listed=b'0.jpg\n'), 'There is no annotation voc/Annotations/0.jpg.xml')])
def test_voc_that_is_refused(kwargs, words):
    with pytest.raises(DataError, match=words):
        voc(**kwargs)


def test_voc_images_of_one_name():
    for name in ('a.png', 'b.png', 'b.jpg', 'c.png', 'c.bmp', 'd.txt'):
        Path('images', name).touch()
    assert find_voc_images('images', ['a', 'b', 'd']) == ['a.png', 'b.jpg', 'd.jpg']
    with pytest.raises(DataError, match='images has 2 images named c: c.bmp, c.png'):
        find_voc_images('images', ['c'])
    assert find_voc_images('none', ['a']) == ['a.jpg']


def test_voc_objects_and_lists():
    box = '<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3.5</xmax></bndbox>'
    Path('a.xml').write_text(f'<annotation><object><name>a</name><difficult>2</difficult>{box}</object></annotation>')
    assert list(read_voc_objects('a.xml', '')) == [('a', True, ('1', '2', '3.5', None))]
    Path('a.txt').write_text('part one/0\n part 1 -1\n')
    assert read_image_set('a.txt') == ['part one/0', 'part 1']


BOX = '<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax></bndbox>'


def xml_dataset(text: str, listed: str = '0', suffix: str = '.jpg') -> None:
    """Check files of MMDetection's XMLDataset, and read them with it if they pass."""
    from mmdet.datasets import XMLDataset
    for place in ('voc/JPEGImages', 'voc/Annotations'):
        Path(place).mkdir(parents=True)
    Image.new('RGB', (4, 4)).save(f'voc/JPEGImages/0{suffix}')
    Path('voc/list.txt').write_text(listed)
    Path('voc/Annotations/0.xml').write_text(f'<annotation>{text}</annotation>')
    check_voc_files('voc/list.txt', 'voc', NAMES, 'data')
    data = XMLDataset(ann_file='voc/list.txt', data_prefix=dict(sub_data_root='voc'), metainfo=dict(classes=NAMES))
    assert [x['bbox_label'] for x in data.get_data_info(0)['instances']] == [1]


def test_voc_boxes_that_the_stock_data_set_reads():
    xml_dataset(f'<size><width> 4 </width><height>4</height></size><object><name>dog</name>{BOX}</object>'
                '<object><name>cow</name></object>')


@pytest.mark.parametrize('text, more, words', [
    (f'<object><name>dog</name><difficult/>{BOX}</object>', {}, "difficult=''; it must be 0 or 1"),
    ('<object><name>dog</name></object>', {}, "class 'dog' with the bndbox .None, None"),
    (f'<object><name>dog </name>{BOX}</object>', {}, "has the class 'dog ', with blanks"),
    (f'<object><name>cow</name>{BOX}</object>', {}, 'No object in .* the objects are of cow'),
    (f'<size/><object><name>dog</name>{BOX}</object>', {}, "has <size> with width=''"),
    (f'<object><name>dog</name>{BOX}</object>', dict(listed='0\n\n'), "list.txt, line 2 is ''"),
    (f'<object><name>dog</name>{BOX}</object>', dict(suffix='.png'), 'no image voc/JPEGImages/0.jpg.*reads .jpg only'),
], ids=lambda x: '' if isinstance(x, (str, dict)) else None)
def test_voc_boxes_that_it_would_fail_on_or_drop(text, more, words):
    with pytest.raises(DataError, match=words):
        xml_dataset(text, **more)


# ---------------------------------------------------------------------------------------------------------------- paths

def test_the_file_that_a_path_means(monkeypatch, folder):
    monkeypatch.setenv('HOME', str(folder))
    for name in ('a.JPG', 'e\u0301.jpg', 'plain.jpg'):
        Path('images', name).touch()
    assert 'has a.JPG, with letters of another case' in similar_file('images/a.jpg')
    assert 'letters of another Unicode form' in similar_file('images/\xe9.jpg')
    assert 'the path has backslashes' in similar_file('images\\plain.jpg')
    assert f'write {folder}/images/plain.jpg' in similar_file('~/images/plain.jpg')
    assert similar_file('images/none.jpg') == similar_file('nowhere/plain.jpg') == ''


# ----------------------------------------------------------------------------------------- labels of MMPretrain's files

@pytest.mark.parametrize('label', [2, [0, 2], [], [2, 0], (1, ), np.array([1, 2]), [1., 2.], None, dict(task=[9])],
                         ids=str)
def test_labels_that_stock_heads_read(label):
    assert find_label_fault(dict(gt_label=label), 3) == ''


@pytest.mark.parametrize('label, words', [
    ([0, 1, 0], 'belongs in gt_score'), ([1, 1, 1], 'belongs in gt_score'), ([True, False], 'belongs in gt_score'),
    ([1., 0., 0.], 'belongs in gt_score'), ([2, 2], 'list each class once'), ([3], 'within 0 ... 2'),
    ([-1], 'within 0 ... 2'), ([.5], 'within 0'), ([float('nan')], 'within 0'), (['dog'], 'numbers of classes'),
    ('dog', 'numbers of classes'), ([[1]], 'numbers of classes'), ([[1], [1, 2]], 'numbers of classes'),
    ([None], 'numbers of classes')], ids=str)
def test_labels_that_they_would_misread(label, words):
    assert words in find_label_fault(dict(gt_label=label), 3)


@pytest.mark.parametrize('label', [None, dict(task=[1])], ids=str)
def test_labels_that_cannot_be_packed(label):
    content = dict(metainfo=dict(classes=NAMES), data_list=[dict(img_path='0.jpg', gt_label=label)])
    Path('labels.json').write_text(json.dumps(content))
    data = MultiLabelDataset('labels.json', data_prefix='images', pipeline=[dict(type='mmpretrain.PackInputs')])
    with pytest.raises(DataError, match='images/0.jpg in data has gt_label=.* It must be a list of numbers of classes'):
        check_samples(data, 3, 'data')
    data.pipeline.transforms = []
    check_samples(data, 3, 'data')


def test_scores_have_one_value_per_class():
    assert find_label_fault(dict(gt_label=[0], gt_score=[0, 1, 0]), 3) == ''
    assert 'gt_score of 2 values' in find_label_fault(dict(gt_score=[0, 1]), 3)
    assert 'within 0 ... 0. A vector of 0 and 1' in find_label_fault(dict(gt_label=[1]), 1)


# ------------------------------------------------------------------------------------------------------- random damage

@pytest.mark.slow
def test_random_damage_is_refused_or_read_rightly(tmp_path, monkeypatch):
    import fuzz_annotation_files as fuzz
    (tmp_path / 'fuzz').mkdir()
    monkeypatch.chdir(tmp_path / 'fuzz')
    fuzz.prepare()
    fuzz.quiet()
    found = Counter(fuzz.run(number) for number in range(200))
    assert {kind for kind, _ in found} == set(fuzz.FUZZERS)
    assert found['coco', 'labels read, boxes read and evaluated'] and found['voc', 'labels read, boxes read']
