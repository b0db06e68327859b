"""Files beside model.onnx in the layout that programs for image taggers read."""
import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from mmasl.errors import ConfigError

LOADING = ('LoadImageFromFile', 'PackInputs')


def tagger_files(model: bytes, metadata: dict[str, Any]) -> dict[str, bytes]:
    """Make the files of a tagger: model.onnx, selected_tags.csv, preprocess.json and thresholds.csv.

    - ``selected_tags.csv`` has one row per class in the order of the scores: tag_id, name, category (0 for all) and
      best_threshold, the threshold of ``pred_score``;
    - ``preprocess.json`` lists the steps from an RGB image to the input: resize, center_crop, to_tensor (divides by
      255), normalize;
    - ``thresholds.csv`` has the mean threshold of each category.

    Args:
        model: The ONNX file.
        metadata: Metadata of a classifier, see :func:`mmasl.apis.onnx_export.prepare_classifier`.

    Returns:
        Contents by file name.

    Raises:
        ConfigError: The head decides by ``topk``, the images are not RGB, or a step of the pipeline has no equivalent.
    """
    thresholds = metadata.get('pred_score_thr')
    if thresholds is None:
        raise ConfigError(f"the head decides by topk={metadata.get('topk')}, and taggers by thresholds: give --thr")
    if metadata['channel_order'] != 'RGB':
        raise ConfigError(f"taggers read RGB images, and the model takes {metadata['channel_order']}: give an .onnx "
                          'file')
    steps = [step for transform in metadata['pipeline'] if (step := _translate(transform, metadata['input_size']))]
    if not steps:  # images of any size, which the file does not take
        steps = [dict(type='resize', size=list(metadata['input_size']), interpolation='bilinear')]
    mean, std = ([value / 255 for value in metadata[key]] for key in ('mean', 'std'))
    steps += [dict(type='to_tensor'), dict(type='normalize', mean=mean, std=std)]
    tags = [dict(tag_id=number, name=name, category=0, best_threshold=f'{threshold:.6g}')
            for number, (name, threshold) in enumerate(zip(metadata['classes'], thresholds))]
    mean_threshold = sum(thresholds) / len(thresholds)
    return {'model.onnx': model, 'selected_tags.csv': _to_csv(tags),
            'preprocess.json': json.dumps(dict(test=steps), indent=1).encode(),
            'thresholds.csv': _to_csv([dict(category=0, name='general', threshold=f'{mean_threshold:.6g}')])}


def _translate(transform: dict[str, Any], input_size: Sequence[int]) -> dict[str, Any] | None:
    """A step of a test pipeline; None for those that load and pack.

    Raises:
        ConfigError: The step has no equivalent.
    """
    kind = str(transform['type']).rpartition('.')[2]
    resize = dict(type='resize', interpolation=transform.get('interpolation', 'bilinear'))
    if kind in LOADING:
        return None
    if kind == 'Resize' and 'scale' in transform and not transform.get('keep_ratio'):
        scale = transform['scale']
        return dict(resize, size=[scale] * 2 if isinstance(scale, int) else [scale[1], scale[0]])
    if kind == 'ResizeEdge' and transform.get('edge', 'short') == 'short':
        return dict(resize, size=transform['scale'])
    if kind == 'CenterCrop':
        return dict(type='center_crop', size=list(input_size))
    raise ConfigError(f'{kind} of the test pipeline has no equivalent in preprocess.json, only Resize, ResizeEdge of '
                      'the short edge and CenterCrop have: give an .onnx file')


def _to_csv(rows: Sequence[dict[str, Any]]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()
