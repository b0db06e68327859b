"""Convert the public copy of Corel-5k to the layout of MMPretrain's MultiLabelDataset.

The copy has labels/words, labels/training_label, labels/test_label, and the images NAME.jpeg in train_jpeg/ and
test_jpeg/. A line of a label file is the name of an image and the numbers of its words, from 1. 0 stands for no word.
"""
import argparse
import json
import os
import shutil
from pathlib import Path

from mmasl.errors import DataError
from mmasl.utils.files import atomic_write
from mmasl.utils.tools import exit_on_user_error, progress

SPLITS = {'train': ('labels/training_label', 'train_jpeg'), 'test': ('labels/test_label', 'test_jpeg')}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('copy', type=Path, help='folder of the public copy: see docs/recipes.md')
    parser.add_argument('root', type=Path, help='folder to write: annotations/ and images/')
    return parser


def read_text(path: Path) -> str:
    """Read a file of the copy.

    Raises:
        DataError: The file does not exist.
    """
    if not path.is_file():
        raise DataError(f'{path} does not exist. Give the folder of the public copy (docs/recipes.md)')
    return path.read_text()


def read_labels(path: Path, words: int) -> dict[str, list[int]]:
    """Read a label file.

    Args:
        path: The file.
        words: Number of words.

    Returns:
        Sorted classes, from 0, by image. Labels of an image that is listed twice are merged.

    Raises:
        DataError: A line is not the name of an image and numbers of words.
    """
    found: dict[str, set[int]] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not (parts := line.split()):
            continue
        name, *labels = parts
        if not all(label.isdecimal() and int(label) <= words for label in labels):
            raise DataError(f'{path}, line {number}: {line!r} must be an image and numbers from 0 to {words}. Get the '
                            'file again')
        found.setdefault(name, set()).update(int(label) - 1 for label in labels if int(label))
    return {name: sorted(labels) for name, labels in found.items()}


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    words = read_text(args.copy / 'labels/words').split()
    labels = {split: read_labels(args.copy / file, len(words)) for split, (file, _) in SPLITS.items()}
    sources = {name: args.copy / SPLITS[split][1] / f'{name}.jpeg' for split in SPLITS for name in labels[split]}
    if missing := [path for path in sources.values() if not path.is_file()]:
        raise DataError(f'{len(missing)} of {len(sources)} images are missing, as {missing[0]}. Get the copy again')
    for folder in ('annotations', 'images'):
        (args.root / folder).mkdir(parents=True, exist_ok=True)
    for name, path in progress(sources.items(), 'images'):
        shutil.copyfile(path, part := args.root / 'images' / f'{name}.jpg.part')
        os.replace(part, part.with_suffix(''))
    for split, found in labels.items():
        content = dict(metainfo=dict(classes=words), data_list=[
            dict(img_path=f'{name}.jpg', gt_label=classes) for name, classes in found.items()])
        atomic_write(args.root / 'annotations' / f'{split}.json', json.dumps(content).encode())
    print(f'{args.root}: {len(labels["train"])} + {len(labels["test"])} images, {len(words)} words')


if __name__ == '__main__':
    main()
