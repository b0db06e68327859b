"""Lists the images that an inferencer gets, and describes those that cannot be read."""
import logging
import os
import os.path as osp
from collections.abc import Iterator, Sequence
from itertools import chain
from os import PathLike
from typing import Any

import cv2
import numpy as np
from mmengine.fileio import get_file_backend, join_path
from mmengine.logging import print_log

from mmasl.datasets.annotation_files import SUFFIXES
from mmasl.datasets.validation import first_few
from mmasl.errors import ConfigError, DataError, MMASLError, UnreadableImageError

Image = str | PathLike | np.ndarray


def list_images(inputs: Image | Sequence[Image]) -> list[str | np.ndarray]:
    """List the images of files, folders, URLs and arrays.

    Args:
        inputs: As in :class:`mmasl.apis.inferencer.MultiLabelInferencer`.

    Returns:
        Paths, URLs and arrays (H, W), (H, W, 1) or (H, W, 3).

    Raises:
        DataError: A file does not exist, a folder or the list has no image, or an array is not an image.
        TypeError: An input is of another type.
    """
    images = list(chain.from_iterable(map(_expand, inputs if isinstance(inputs, (list, tuple)) else [inputs])))
    if not images:
        raise DataError('the list of images is empty')
    return images


def check_out_dir(images: Sequence[str | np.ndarray], out_dir: str | PathLike) -> None:
    """Check that pictures do not replace images: they have the names of these, with .png.

    Args:
        images: As :func:`list_images` returns them.
        out_dir: Folder for pictures; '' for none.

    Raises:
        ConfigError: An image is in the folder.
    """
    if not out_dir or not osp.isdir(out_dir):
        return
    for image in images:
        if isinstance(image, str) and osp.exists(image) and osp.samefile(osp.dirname(image) or '.', out_dir):
            raise ConfigError(f'{os.fspath(out_dir)} is the folder of {image}, which a picture could replace: write '
                              'pictures (--out-dir) to another folder')


def _expand(item: Image) -> Iterator[str | np.ndarray]:
    if isinstance(item, np.ndarray):
        images = item if item.ndim == 4 else [item]
        for image in images:
            channels = image.shape[2] if image.ndim == 3 else 1
            if image.ndim not in (2, 3) or channels not in (1, 3) or image.dtype != np.uint8 or not image.size:
                raise DataError(f'an array of shape {item.shape} and {item.dtype} is not an image: give (H, W, 3), '
                                'uint8, BGR, or (H, W) of grey, or (N, H, W, 3)')
            yield image
    elif not isinstance(item, (str, PathLike)):
        raise TypeError(f'{type(item).__name__} is not an image: give a path, a URL, an array, or a list of these')
    elif '://' in (path := str(item)) and not hasattr(get_file_backend(path), 'isdir'):
        yield path  # http has no folders, and no cheap check whether a file exists
    else:
        path = osp.expanduser(path)
        backend = get_file_backend(path)
        if not backend.exists(path):
            raise DataError(f'no such image or folder: {path}')
        if not backend.isdir(path):
            yield path
            return
        files = sorted(backend.list_dir_or_file(path, list_dir=False))
        names = [name for name in files if name.lower().endswith(SUFFIXES)]
        if not names:
            raise DataError(f'the folder {path} has no image: files must end in {", ".join(SUFFIXES)}, and subfolders '
                            'are not searched')
        others = [name for name in files if name not in set(names)]
        if osp.isdir(path):  # the listing leaves them out, such as ._0.jpg of a Mac
            others += sorted(name for name in os.listdir(path) if name[0] == '.' and name.lower().endswith(SUFFIXES))
        if others:
            print_log(f'{path}: {len(others)} files that are hidden or do not end as images do are left out: '
                      f'{first_few(others)}', 'current', logging.WARNING)
        for name in names:
            yield join_path(path, name)


def describe_read_error(error: Exception) -> str:
    """Describe an error of mmcv's LoadImageFromFile, which raises an assertion for a file that is not an image."""
    if isinstance(error, (AssertionError, cv2.error)):
        return 'the file is truncated or not an image'
    return str(error) if isinstance(error, MMASLError) else f'{type(error).__name__}: {error}'


def match_channels(image: np.ndarray, color_type: str) -> np.ndarray:
    """Give an array the channels that a loader gives a file.

    Args:
        image: (H, W), (H, W, 1) or (H, W, 3) in BGR, uint8.
        color_type: Of the loader, such as 'color', 'grayscale' or 'unchanged'.

    Returns:
        (H, W) for 'grayscale', (H, W, 3) for 'color'; the array itself for 'unchanged'.
    """
    if color_type.startswith('grayscale'):
        return cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if image.shape[2:] == (3, ) else image.reshape(image.shape[:2])
    if color_type.startswith('color') and image.shape[2:] != (3, ):
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return image


def unreadable_images(reasons: dict[str, str], results: Any = None) -> UnreadableImageError:
    """Build the error for images that cannot be read.

    Args:
        reasons: The reason for each image.
        results: Results of the other images.
    """
    lines = [f'  {image}: {reason}' for image, reason in reasons.items()]
    note = ' (the results attribute of this error has the others)' if results is not None else ''
    return UnreadableImageError('\n'.join([f'{len(reasons)} images cannot be read{note}:', *lines]), reasons, results)
