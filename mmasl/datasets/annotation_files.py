"""What files of labels must have: COCO's JSON, VOC's XML, lists of images and lists of class names.

The data sets of mmasl read their files here. The checks of MMDetection's data sets read the same files here, under the
rules of the stock classes. What is required depends on the purpose: to train, to evaluate, or only to predict.
"""
import json
import locale
import math
import os
import re
import unicodedata
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mmengine.fileio import exists, get

from mmasl.errors import ConfigError, DataError
from mmasl.utils.config import read_lines

COCO_LISTS = dict(images='image', categories='category', annotations='annotation')
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm', '.pgm', '.gif', '.jfif')  # OpenCV's


def require_file(path: str, what: str, hint: str) -> None:
    """Raise DataError with the hint unless the file exists."""
    if '\0' in path or not exists(path):
        raise DataError(f'There is no {what} {path}{similar_file(path)}. {hint}')


def require_unique(values: Iterable, where: str) -> None:
    """Raise DataError for the most frequent value if it occurs more than once."""
    value, times = max(Counter(values).items(), key=lambda item: item[1], default=(None, 0))
    if times > 1:
        raise DataError(f'{where} {value!r} {times} times; each must be unique.')


def similar_file(path: str) -> str:
    """Describe the file that a wrong path probably means, for an error message; '' without one."""
    if path.startswith('~') and os.path.exists(os.path.expanduser(path)):
        return f' (~ is not expanded here: write {os.path.expanduser(path)})'
    if '\\' in path and os.path.exists(path.replace('\\', '/')):
        return ' (the path has backslashes, of Windows: write / in the annotation file)'
    folder, name = os.path.split(path)
    if not name or not os.path.isdir(folder or '.'):
        return ''

    def normal(text: str) -> str:
        return unicodedata.normalize('NFC', text).casefold()

    for other in sorted(os.listdir(folder or '.')):
        if normal(other) == normal(name) and other != name:
            kind = 'case' if other.casefold() == name.casefold() else 'Unicode form'
            return f' (the folder has {other}, with letters of another {kind}: rename it)'
    return ''


# -------------------------------------------------------------------------------------------------------- class names

def read_class_names(names: Any, where: str, expand_user: bool = False) -> Sequence[Any]:
    """Read ``classes`` of a data set: a list, or a text file with one name per line, as MMEngine reads it.

    Args:
        names: The setting.
        where: Its key, for the messages.
        expand_user: Whether the data set expands ``~``, as MMPretrain does in ``classes``.

    Returns:
        The names.

    Raises:
        ConfigError: ``names`` is neither a list nor a file, or a name is empty, repeated, or neither text nor a number.
        DataError: The file is not UTF-8, starts with a byte order mark, or has an empty line.
    """
    source = where
    if isinstance(names, str):
        path, source = os.path.expanduser(names) if expand_user else names, f'{names} of {where}'
        try:
            found = read_lines(path)
        except UnicodeDecodeError as error:
            raise DataError(f'{source} is not UTF-8 ({error}). Save it as UTF-8.') from None
        except (OSError, TypeError, ValueError):
            raise ConfigError(f'{where}={names!r} is a string, but no file has this name. Write [{names!r}] for one '
                              'class, or the path of a text file with one name per line.') from None
        if found and found[0].startswith('\ufeff'):
            raise DataError(f'{source} starts with a byte order mark, which would belong to the first name. Save it as '
                            'UTF-8 without a mark.')
        for number, name in enumerate(found, 1):
            if not name.strip():
                raise DataError(f'{source} has an empty line {number}, which would be a class. Remove it.')
        names = found
    if isinstance(names, bytes) or not isinstance(names, Sequence):
        raise ConfigError(f'{where}={names!r} is not a list of class names. Write [...] with one name per class.')
    for name in names:
        if isinstance(name, bool) or not isinstance(name, (str, int, float)) or name == '':
            raise ConfigError(f'{source} has the class {name!r}. A class name must be text that is not empty.')
    value, times = max(Counter(map(str, names)).items(), key=lambda item: item[1], default=(None, 0))
    if times > 1:
        raise ConfigError(f'{source} has {value!r} {times} times; each class must be unique.')
    return names


def use_class_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Read ``classes`` and ``metainfo['classes']`` in the arguments of a data set, see :func:`read_class_names`."""
    kwargs, metainfo = dict(kwargs), kwargs.get('metainfo')
    if kwargs.get('classes') is not None:
        kwargs['classes'] = list(map(str, read_class_names(kwargs['classes'], 'classes', expand_user=True)))
    if metainfo is not None and not isinstance(metainfo, Mapping):
        raise ConfigError(f'metainfo={metainfo!r} is not a dict. Write metainfo=dict(classes=[...]).')
    if metainfo and 'classes' in metainfo and metainfo['classes'] is None:  # as if it were not set
        kwargs['metainfo'] = {key: value for key, value in metainfo.items() if key != 'classes'}
    elif metainfo and 'classes' in metainfo:
        names = read_class_names(metainfo['classes'], 'metainfo.classes')
        kwargs['metainfo'] = dict(metainfo, classes=tuple(map(str, names)))
    return kwargs


# ---------------------------------------------------------------------------------------------------------- COCO files

class CocoRules(NamedTuple):
    """What a JSON file in COCO's layout must have.

    Attributes:
        images, categories, annotations: Keys that every entry of the list must have. Annotations have ``image_id`` and
            ``category_id`` besides.
        optional: Whether the list of annotations may be missing, as in ``image_info_test-dev2017.json``.
        names: Whether category names become text. Otherwise they stay as they are in the file.
        strict: Whether MMDetection and pycocotools read the file. It must have the encoding of ``open``, and may list
            an image file under several ids. Otherwise UTF-8 with a byte order mark and UTF-16 are read too.
        utf8: Whether names must be UTF-8. Otherwise wrong bytes are replaced.
    """
    images: tuple[str, ...] = ('id', 'file_name')
    categories: tuple[str, ...] = ('id', 'name')
    annotations: tuple[str, ...] = ()
    optional: bool = False
    names: bool = True
    strict: bool = False
    utf8: bool = True


LABELS = CocoRules()
# Of MMDetection's CocoDataset, and of pycocotools' evaluation in its CocoMetric.
BOXES = CocoRules(images=('id', 'file_name', 'width', 'height'), annotations=('id', ),
                  names=False, strict=True)
EVALUATION = CocoRules(images=('id', ), annotations=('id', 'bbox', 'area', 'iscrowd'),
                       names=False, strict=True)


def read_coco_file(path: str, hint: str, rules: CocoRules = LABELS, decimals: bool = True) -> dict:
    """Read a JSON file in COCO's layout.

    Args:
        path: The file.
        hint: What to do, for the error messages.
        rules: What it must have.
        decimals: Whether numbers with decimals are needed elsewhere than in ids and names. Without them, a file with
            polygons is read in two thirds of the time, and other numbers with decimals are None.

    Returns:
        The content. ``images`` and ``categories`` are lists, and ``annotations`` too unless they are optional.

    Raises:
        DataError: The file does not exist, is damaged or of another kind; an entry lacks a key or has a wrong value
            there; an image or category is repeated, except for image files that MMDetection reads; or an annotation is
            of an unknown image or category.
    """
    require_file(path, 'annotation file', hint)
    text, damaged = _decode(path, rules)
    if not decimals:
        try:
            return _check(path, _parse(path, text, dict[str, None]().get, hint), rules, damaged, hint)
        except DataError:
            pass  # ids may have decimals: 1.0 for 1
    return _check(path, _parse(path, text, None, hint), rules, damaged, hint)


def _decode(path: str, rules: CocoRules) -> tuple[str, bool]:
    """The text of a JSON file, and whether names must be searched for replaced bytes."""
    raw = get(path)
    encoding = locale.getpreferredencoding(False) if rules.strict else json.detect_encoding(raw)
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        if rules.strict:
            raise DataError(f'{path} is not in the encoding {encoding} ({error}). Save it as UTF-8.') from None
        return raw.decode(encoding, errors='replace'), rules.utf8
    if text.startswith('\ufeff'):
        raise DataError(f'{path} starts with a byte order mark, which pycocotools cannot read. Save it as UTF-8 '
                        'without a mark.')
    return text, False


def _parse(path: str, text: str, parse_float: Callable | None, hint: str) -> Any:
    try:
        return json.loads(text, parse_float=parse_float)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{path} is not valid JSON ({error}). {hint}') from error


def _check(path: str, content: Any, rules: CocoRules, damaged: bool, hint: str) -> dict:
    """Check lists, keys and values, convert the names, and return the content."""
    found = set(content) if isinstance(content, dict) else set()
    wanted = set(COCO_LISTS) - ({'annotations'} if rules.optional else set())
    if lacking := sorted(wanted - found):
        raise DataError(f'{path} is not a file of annotated instances: it lacks {lacking} and has {sorted(found)}. '
                        f'{hint}')
    for group, word in COCO_LISTS.items():
        entries, keys = content.get(group, []), getattr(rules, group)
        if not isinstance(entries, list):
            raise DataError(f'{path}: {group} is not a list. {hint}')
        for number, entry in enumerate(entries):
            if fault := _find_fault(entry, keys, damaged):
                raise DataError(f'{path}: entry {number} of {group}, {str(entry)[:80]}, {fault}. {hint}')
        for key, name in (('id', 'id'), ('file_name', 'file')):
            if key in keys and (key == 'id' or not rules.strict):
                require_unique([entry[key] for entry in entries], f'{path} lists {word} {name}')
    if rules.names:
        for category in content['categories']:
            category['name'] = str(category['name'])
    _require_known(path, content, hint)
    return content


def _find_fault(entry: Any, keys: Sequence[str], damaged: bool) -> str:
    if not isinstance(entry, dict):
        return 'is not a dict'
    for key in keys:
        if key not in entry:
            return f'has no {key}'
        if not _VALUES[key][0](entry[key]):
            return f'has {key}={entry[key]!r}, which is not {_VALUES[key][1]}'
        if damaged and key in ('name', 'file_name') and '\ufffd' in str(entry[key]):
            return f'has a {key} that is not UTF-8, {entry[key]!r}'
    return ''


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (int, float)) and math.isfinite(value))


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    'id': (_is_id, 'a number or text'),
    'file_name': (lambda value: isinstance(value, str) and value != '' and '\0' not in value, 'the name of a file'),
    'name': (lambda value: (isinstance(value, str) and value != '') or _is_number(value), 'a name'),
    'width': (lambda value: _is_number(value) and value == value, 'a number of pixels'),
    'height': (lambda value: _is_number(value) and value == value, 'a number of pixels'),
    'bbox': (lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_number, value)),
             '[x, y, width, height] in pixels'),
    'area': (_is_number, 'a number of square pixels; of a box it is width * height'),
    'iscrowd': (lambda value: _is_number(value) or isinstance(value, bool), '0 or 1'),
}


def require_value(ann: dict, key: str, path: str) -> None:
    """Raise DataError unless an annotation of a file has a valid value of this key."""
    if fault := _find_fault(ann, (key, ), False):
        box = ann.get('bbox')
        cure = f'Add area={box[2] * box[3]:g}, its width * height' if key == 'area' and box else 'Correct it'
        raise DataError(f'Annotation {ann.get("id")} in {path} {fault}. {cure}; MMDetection would fail.')


def _require_known(path: str, content: dict, hint: str) -> None:
    ids = {f'{word}_id': {entry['id'] for entry in content[group]}
           for group, word in COCO_LISTS.items() if group != 'annotations'}
    for ann in content.get('annotations', []):
        for key, known in ids.items():
            value = ann.get(key)
            if not _is_id(value) or value not in known:
                first = next(iter(known), None)
                kind = f' ({type(value).__name__}, but the file has ids such as {first!r})' if (
                    value is not None and type(value) is not type(first) and known) else ''
                raise DataError(f'Annotation {ann.get("id")} in {path} has the unknown {key} {value!r}{kind}. {hint}')


def require_selected(path: str, categories: list[dict], classes: Sequence[Any] | None) -> None:
    """Raise DataError if two categories have the same name, and a data set with these classes would use it.

    Args:
        path: The file.
        categories: Its categories.
        classes: Names that the data set selects; None for all.
    """
    seen: dict[Any, Any] = {}
    for category in categories:
        name = category['name']
        if name in seen and (classes is None or name in classes):
            raise DataError(f'{path}: categories {seen[name]!r} and {category["id"]!r} are both named {name!r}. Rename '
                            'or remove one of them; each class must have one category.')
        seen.setdefault(name, category['id'])


# ----------------------------------------------------------------------------------------------------------- VOC files

class VOCObject(NamedTuple):
    """An object of an annotation file.

    Attributes:
        name: Class name as written.
        difficult: Whether it is marked as difficult.
        box: Texts of xmin, ymin, xmax and ymax; None where one is missing.
    """
    name: str
    difficult: bool
    box: tuple[str | None, ...]


def read_image_set(path: str) -> list[str]:
    """Read a list of images: one name per line, without suffix. Empty lines and surrounding blanks are ignored.

    A second column of -1, 0 or 1, as in VOC's lists of one class, is ignored too.

    Raises:
        DataError: The file is not UTF-8.
    """
    try:
        text = get(path).decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise DataError(f'{path} is not UTF-8 ({error}). Save it as UTF-8.') from None
    lines = [re.sub(r'\s+(-1|0|1)$', '', line.strip()) for line in re.split('[\r\n]+', text)]
    return [line for line in lines if line]


def find_voc_images(folder: str, names: Sequence[str]) -> list[str]:
    """Find the files of images: ``NAME.jpg``, as in VOC, or the only image of this name with another suffix.

    Args:
        folder: Local folder of the images.
        names: Names without suffix.

    Returns:
        The names with suffix; with .jpg where no file is found.

    Raises:
        DataError: Several files have the name, and none of them ends in .jpg.
    """
    files: dict[str, list[str]] = {}
    for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        stem, suffix = os.path.splitext(file)
        if suffix.lower() in SUFFIXES:
            files.setdefault(stem, []).append(file)
    found = []
    for name in names:
        some = files.get(name, [])
        if f'{name}.jpg' in some or not some:
            some = [f'{name}.jpg']
        if len(some) > 1:
            raise DataError(f'{folder} has {len(some)} images named {name}: {", ".join(some)}. Leave one of them.')
        found.append(some[0])
    return found


def read_voc_objects(path: str, hint: str, strict: bool = False) -> Iterator[VOCObject]:
    """Read the objects of an annotation file in VOC's layout.

    Args:
        path: The file.
        hint: What to do if it does not exist.
        strict: Whether the file must be readable by MMDetection's XMLDataset. Otherwise an empty ``<difficult>`` counts
            as 0, and encodings of several bytes, such as gb2312, are read too.

    Raises:
        DataError: The file does not exist or is not valid XML, an object has no name or another mark than 0 or 1, or
            the size is not a number.
    """
    require_file(path, 'annotation', hint)
    root = _parse_xml(path, strict)
    size = root.find('size')
    if strict and size is not None:
        for key in ('width', 'height'):
            if not re.fullmatch(r'\s*\d+\s*', text := size.findtext(key) or '', re.ASCII):
                raise DataError(f'{path} has <size> with {key}={text!r}; it must be a number of pixels.')
    for obj in root.findall('object'):
        name, mark = obj.findtext('name') or '', obj.findtext('difficult')
        mark = '0' if mark is None else mark.strip() or ('' if strict else '0')
        if not name.strip():
            raise DataError(f'{path} has an object without a name. Give it one, or remove it.')
        if not re.fullmatch(r'\d+', mark, re.ASCII):
            raise DataError(f'{path} has an object of class {name!r} with difficult={mark!r}; it must be 0 or 1.')
        yield VOCObject(name, int(mark) != 0, tuple(
            obj.findtext(f'bndbox/{key}') for key in ('xmin', 'ymin', 'xmax', 'ymax')))


def _parse_xml(path: str, strict: bool) -> ET.Element:
    raw = get(path)
    try:
        return ET.fromstring(raw)
    except (ET.ParseError, ValueError, LookupError) as error:
        # expat does not know encodings of several bytes, such as gb2312.
        declared = None if strict else re.match(rb'\s*<\?xml[^>]*encoding=["\']([\w.-]+)["\'][^>]*\?>', raw)
        reason: Exception = error
        try:
            if declared:
                return ET.fromstring(raw[declared.end():].decode(declared[1].decode()))
        except ET.ParseError:
            pass
        except (ValueError, LookupError) as second:
            reason = second
        raise DataError(f'{path} is not valid XML ({reason}). Get it again.') from error
