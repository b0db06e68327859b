"""Renders the errors of a classifier as one HTML page that loads nothing from elsewhere.

The template, style and script are error_page.html, error_page.css and error_page.js beside this file.
"""
import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from mmengine import fileio
from PIL import Image, ImageOps

from mmasl.analysis.error_analysis import BINS, PAIR_CLASSES, ErrorAnalysis, Misprediction, Predictions

CLASSES = 400  # rows of the class table at most: half of them the worst and half the most frequent classes
METRICS = [*((name, name, '{:.1f}') for name in ('mAP', 'CP', 'CR', 'CF1', 'OP', 'OR', 'OF1')),
           ('probability gap', 'gap', '{:+.3f}'), ('calibration error', 'ECE', '{:.3f}')]
GALLERIES = ('False positives of highest p: labels that may be missing',
             'False negatives of lowest p: labels that may be wrong')


def thumbnail(path: str, size: int = 160) -> str | None:
    """Read an image as a data URI of at most ``size`` x ``size`` pixels.

    Args:
        path: Path or URL of the image.
        size: Largest height and width in pixels.

    Returns:
        The data URI of a JPEG file, or None if the image cannot be read.
    """
    try:
        with Image.open(io.BytesIO(fileio.get(path))) as image:
            image.draft('RGB', (2 * size, 2 * size))
            small = ImageOps.exif_transpose(image)
        if small.mode[0] in 'IF':  # convert() would clip 16 bits
            pixels = np.asarray(small, np.float32)
            small = Image.fromarray((pixels * (255 / pixels.max().clip(255))).astype(np.uint8))
        small = small.convert('RGB')
        small.thumbnail((size, size))
        file = io.BytesIO()
        small.save(file, 'JPEG', quality=80)
    except Exception:  # Pillow raises many kinds of errors for damaged files
        return None
    return 'data:image/jpeg;base64,' + base64.b64encode(file.getvalue()).decode()


def render_error_page(errors: ErrorAnalysis, predictions: Predictions, facts: Mapping[str, str], top: int = 60,
                      progress: Callable[[Sequence[str], str], Iterable[str]] = lambda items, what: items) -> str:
    """Render the page.

    Args:
        errors: Result of :func:`mmasl.analysis.error_analysis.analyse_errors`.
        predictions: Its argument.
        facts: Facts at the top of the page, such as ``config`` and ``checkpoint``.
        top: Number of false positives and of false negatives to draw.
        progress: Wraps the paths of the images to read. Its second argument describes the step.

    Returns:
        The HTML page.
    """
    drawn = errors.false_positives[:top], errors.false_negatives[:top]
    paths = sorted({predictions.images[m.row] for kind in drawn for m in kind} - {''})
    pictures = {path: thumbnail(path) for path in progress(paths, 'thumbnails')}
    shown = _shown_classes(errors)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    read = environment.loader.get_source  # type: ignore[union-attr]
    return environment.get_template('error_page.html').render(
        title=f'Errors of {facts.get("config", "the model")}',
        style=read(environment, 'error_page.css')[0], script=read(environment, 'error_page.js')[0],
        facts={**facts, **_count_facts(predictions)}, rules=list(errors.reports),
        metrics=[(name, form, [report[key] for report in errors.reports.values()]) for name, key, form in METRICS],
        rule=_describe_rule(errors, predictions), classes=_class_rows(errors, predictions, shown),
        class_note=_class_note(errors, shown), bins=BINS,
        confused=_matrix(errors.confused, errors.worst, predictions),
        together=_matrix(100 * errors.together, errors.frequent, predictions),
        pairs=[(predictions.classes[a], predictions.classes[b], count) for a, b, count in errors.pairs],
        paired=min(PAIR_CLASSES, len(predictions.classes)),
        galleries=[(title, [_describe(m, predictions, pictures) for m in kind])
                   for title, kind in zip(GALLERIES, drawn)],
        unread=[path for path, picture in pictures.items() if picture is None], data=_chart_data(errors, shown))


def _shown_classes(errors: ErrorAnalysis) -> np.ndarray:
    """Classes of the table by ascending AP: all, or those of lowest AP and those with the most positives."""
    order = errors.ap.argsort(kind='stable')  # NaN, without positives, is last
    if order.size <= CLASSES:
        return order
    kept = np.concatenate([order[:CLASSES // 2], (-errors.counts[2]).argsort(kind='stable')[:CLASSES // 2]])
    return order[np.isin(order, kept)]


def _count_facts(predictions: Predictions) -> dict[str, str]:
    counts = [f'{(predictions.labels == value).sum():,} {name}'
              for value, name in ((1, 'positive'), (0, 'negative'), (-1, 'ignored'))]
    return {'images': f'{len(predictions.labels):,}', 'classes': f'{len(predictions.classes):,}',
            'labels': ', '.join(counts)}


def _describe_rule(errors: ErrorAnalysis, predictions: Predictions) -> str:
    if predictions.thresholds is not None:
        text = f'Below, labels are predicted from the thresholds of the checkpoint on: at p of {_span(errors.half)}. '
    if predictions.settings is None and predictions.thresholds is not None:
        return text + 'This loss has no known p* beyond which it discards negatives.'
    if predictions.settings is None:
        return ('Below, labels are predicted at p > 1/2. This loss has no posterior in closed form and no known p* '
                'beyond which it discards negatives.')
    if predictions.thresholds is None:
        text = f'Below, labels are predicted where the posterior exceeds 1/2: at p > {_span(errors.half)}. '
    if np.isnan(errors.p_star).all():
        return text + 'This setting discards no negatives: their gradient does not vanish for p → 1.'
    return text + (f'Beyond p* = {_span(errors.p_star)} the gradient of a negative decreases to 0: the loss treats the '
                   'label as wrong (Sec. 2.5 of arXiv 2009.14119).')


def _span(values: np.ndarray) -> str:
    low, high = f'{np.nanmin(values):.3f}', f'{np.nanmax(values):.3f}'
    return low if low == high else f'{low} to {high}'


def _class_rows(errors: ErrorAnalysis, predictions: Predictions, shown: np.ndarray) -> list[dict[str, Any]]:
    tp, predicted, positive = errors.counts
    with np.errstate(invalid='ignore'):
        percentages = np.stack([errors.ap, 100 * tp / predicted, 100 * tp / positive,
                                200 * tp / (predicted + positive)])
    return [dict(name=predictions.classes[c], positives=positive[c], percentages=percentages[:, c],
                 false_positives=predicted[c] - tp[c], false_negatives=positive[c] - tp[c], gap=errors.gaps[c])
            for c in shown]


def _class_note(errors: ErrorAnalysis, shown: np.ndarray) -> str:
    note = ('Percent. Click a heading to sort, and a class to see its curves. Gap: mean p of positives minus mean '
            '1 - p of negatives.')
    if len(shown) < errors.ap.size:
        note = (f'{len(shown):,} of {errors.ap.size:,} classes: the {CLASSES // 2} of lowest AP and the {CLASSES // 2} '
                f'with the most positives. All sums include all classes. {note}')
    return note


def _matrix(values: np.ndarray, classes: np.ndarray, predictions: Predictions) -> dict[str, Any]:
    """Matrix of pairs of classes; ``largest`` scales the colours and ignores the diagonal."""
    largest = np.nanmax(np.where(np.eye(len(values), dtype=bool), 0, values), initial=0) or 1
    return dict(names=[predictions.classes[c] for c in classes], values=values, largest=largest)


def _describe(m: Misprediction, predictions: Predictions, pictures: Mapping[str, str | None]) -> dict[str, Any]:
    """Fields of an error in the gallery."""
    path = predictions.images[m.row]
    text = f'labelled {"yes" if m.label else "no"}, p {m.p:.3f}'
    if m.posterior is not None:
        text += f', posterior {m.posterior:.3f}'
    if m.gradient is not None:
        text += f', gradient {m.gradient:.0%} of its peak'
    return dict(path=path, file=path.replace('\\', '/').rsplit('/', 1)[-1] or f'image {m.row}',
                picture=pictures.get(path), text=text, beyond_p_star=m.beyond_p_star,
                **{'class': predictions.classes[m.column]})


def _chart_data(errors: ErrorAnalysis, shown: np.ndarray) -> dict[str, Any]:
    """Histograms and marks of the charts: of each class shown, and last of all labels together."""
    def finite(values: np.ndarray) -> list[float | None]:
        return [None if np.isnan(value) else round(float(value), 4) for value in values]

    def with_common(values: np.ndarray) -> np.ndarray:
        """The values of the classes shown, and the value of all classes if they share one."""
        return np.append(values[shown], values[0] if (values == values[0]).all() else np.nan)

    return dict(rule=next(iter(errors.reports)),
                counts=[*errors.histograms[shown].tolist(), errors.histograms.sum(0).tolist()],
                half=finite(with_common(errors.half)), star=finite(with_common(errors.p_star)),
                gap=finite(np.append(errors.gaps[shown], errors.gaps[-1])))
