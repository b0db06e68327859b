"""Lists the images that an inferencer gets, and describes those that cannot be read."""
import os.path as osp
from collections.abc import Iterator, Sequence
from itertools import chain
from os import PathLike
from typing import Any

import cv2
import numpy as np
from mmengine.fileio import get_file_backend, join_path

from mmasl.errors import DataError, UnreadableImageError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm', '.pgm')

Image = str | PathLike | np.ndarray


def list_images(inputs: Image | Sequence[Image]) -> list[str | np.ndarray]:
    """List the images of files, folders, URLs and arrays.

    Args:
        inputs: As in :class:`mmasl.apis.inferencer.MultiLabelInferencer`.

    Returns:
        Paths, URLs and arrays (H, W, 3).

    Raises:
        DataError: A file does not exist, a folder or the list has no image, or an array is not an image.
        TypeError: An input is of another type.
    """
    images = list(chain.from_iterable(map(_expand, inputs if isinstance(inputs, (list, tuple)) else [inputs])))
    if not images:
        raise DataError('the list of images is empty')
    return images


def _expand(item: Image) -> Iterator[str | np.ndarray]:
    if isinstance(item, np.ndarray):
        images = item if item.ndim == 4 else [item]
        for image in images:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
                raise DataError(f'an array of shape {item.shape} and {item.dtype} is not an image: give (H, W, 3) or '
                                '(N, H, W, 3), uint8, BGR')
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
        names = sorted(name for name in backend.list_dir_or_file(path, list_dir=False)
                       if name.lower().endswith(SUFFIXES))
        if not names:
            raise DataError(f'the folder {path} has no image: files must end in {", ".join(SUFFIXES)}, and subfolders '
                            'are not searched')
        for name in names:
            yield join_path(path, name)


def describe_read_error(error: Exception) -> str:
    """Describe an error of mmcv's LoadImageFromFile, which raises an assertion for a file that is not an image."""
    if isinstance(error, (AssertionError, cv2.error)):
        return 'the file is truncated or not an image'
    return f'{type(error).__name__}: {error}'


def unreadable_images(reasons: dict[str, str], results: Any = None) -> UnreadableImageError:
    """Build the error for images that cannot be read.

    Args:
        reasons: The reason for each image.
        results: Results of the other images.
    """
    lines = [f'  {image}: {reason}' for image, reason in reasons.items()]
    note = ' (the results attribute of this error has the others)' if results is not None else ''
    return UnreadableImageError('\n'.join([f'{len(reasons)} images cannot be read{note}:', *lines]), reasons, results)
