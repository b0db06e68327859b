"""Where a multi-label classifier is wrong, and where its labels may be: one HTML page that loads nothing.

:func:`analyse_errors` counts, :func:`render` writes what it found, :func:`candidates` lists labels to look at again.
"""
import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine import fileio
from PIL import Image, ImageOps

from mmasl.analysis.gradient import Setting, analyse, loss_and_gradient
from mmasl.evaluation.metrics import Conventions, count_outcomes, multilabel_metrics, probability_gap
from mmasl.ops import inverse_posterior, posterior

BINS = 100  # of the histograms; the threshold curves have their ends
CLASSES = 400  # rows of the table at most, half of them the worst and half the most frequent
MATRIX, PAIRED = 20, 200  # classes of the matrices, and those whose pairs are counted
FIGURES = ('mAP', 'CP', 'CR', 'CF1', 'OP', 'OR', 'OF1')


class Results(NamedTuple):
    """What a classifier says of N images that have labels.

    Args:
        logits: float32 (N, C).
        labels: int8 (N, C): 1 positive, 0 negative, -1 ignored.
        images: Path or URL of each image, '' for none.
        classes: Names.
        settings: Parameters of the loss, as :func:`mmasl.ops.posterior` takes them, plain numbers or one a class; None
            for a loss without posterior.
    """
    logits: np.ndarray
    labels: np.ndarray
    images: Sequence[str]
    classes: Sequence[str]
    settings: Mapping[str, Any] | None = None


class Mistake(NamedTuple):
    """A label that the model contradicts.

    Args:
        row, column: Image and class.
        label: What the data set says: 0 or 1.
        p, posterior: Probability of a positive, by the sigmoid and calibrated; the latter None without settings.
        beyond: Whether the loss discards this negative: p > p* (Sec. 2.5).
        gradient: Its gradient as a share of the largest that a negative can have; None for a positive.
    """
    row: int
    column: int
    label: int
    p: float
    posterior: float | None
    beyond: bool
    gradient: float | None


@dataclass(frozen=True)
class Errors:
    """What :func:`analyse_errors` found; arrays of classes have C entries.

    Args:
        reports: Metrics by the rule of decision, which names them; the first rule is the one that all else follows.
        ap: Average precision, in percent; NaN without positives.
        counts: True positives, predictions and positives, (3, C).
        gaps: Probability gap, (C + 1,), the last one of all labels.
        histograms: Negatives and positives by p, (C, 2, BINS); bin k has k / BINS < p <= (k + 1) / BINS, and the first
            has 0 too.
        half: p at which the posterior is 1/2, or 1/2 where there is none; 1 where it stays below.
        p_star: p beyond which the loss discards negatives; NaN where it discards none.
        false_positives, false_negatives: The mistakes, the most confident first. Of the false positives, ``top`` and
            all beyond p*; of the false negatives, ``top``.
        together: (K, K): of the images with the first label, the share that has the second too; NaN if none is known.
        confused: (K, K): images in which the first label was missed and the second wrongly predicted.
        frequent, worst: Classes of these matrices, the most frequent and those of most mistakes.
        pairs: (missed, predicted, images), the most frequent pairs among the ``PAIRED`` classes of most mistakes.
    """
    reports: dict[str, dict[str, float]]
    ap: np.ndarray
    counts: np.ndarray
    gaps: np.ndarray
    histograms: np.ndarray
    half: np.ndarray
    p_star: np.ndarray
    false_positives: list[Mistake]
    false_negatives: list[Mistake]
    together: np.ndarray
    confused: np.ndarray
    frequent: np.ndarray
    worst: np.ndarray
    pairs: list[tuple[int, int, int]]


def analyse_errors(results: Results, top: int = 60) -> Errors:
    """Count the errors and find the most confident ones.

    A label is predicted where its posterior exceeds 1/2, or p where there is no posterior.

    Raises:
        ValueError: As :func:`mmasl.evaluation.metrics.multilabel_metrics`.
    """
    logits, labels, classes = results.logits, results.labels, list(results.classes)
    p = torch.from_numpy(logits).sigmoid().numpy()
    conventions = Conventions(topk=None)
    report, ap = multilabel_metrics(p, labels, conventions, classes)
    decisive, half, reports = p, np.full(len(classes), 0.5), {'p > 1/2': report}
    if results.settings is not None:
        blocks = torch.from_numpy(logits).split(max(1, 2**24 // len(classes)))  # its steps need much memory
        decisive = torch.cat([posterior(block, **results.settings) for block in blocks]).numpy()
        half[:] = inverse_posterior(0.5, **results.settings).sigmoid().numpy()
        reports = {'posterior > 1/2': multilabel_metrics(p, labels, conventions, classes, decisive)[0], **reports}

    predicted = decisive > 0.5
    counts = count_outcomes(predicted, labels)
    missed, wrong = ~predicted & (labels == 1), predicted & (labels == 0)
    mistakes = missed.sum(0) + wrong.sum(0)
    worst, frequent = _largest(mistakes, PAIRED), _largest(counts[2], MATRIX)
    confused = _products(missed[:, worst], wrong[:, worst])
    order = confused.ravel().argsort(kind='stable')[::-1][:15]
    pairs = [(int(worst[i]), int(worst[j]), int(confused[i, j])) for i, j in (divmod(k, len(worst)) for k in order)]
    positive = labels[:, frequent] == 1
    with np.errstate(invalid='ignore'):
        together = _products(positive, positive) / _products(positive, labels[:, frequent] >= 0)

    groups = _by_setting(results.settings, len(classes))
    p_star = _p_star(groups, len(classes))

    def mistakes_of(found: np.ndarray, sign: int) -> list[Mistake]:
        """The most confident first; those beyond p* are all kept."""
        rows, columns = found.nonzero()
        order = np.lexsort([columns, rows, sign * logits[rows, columns]])
        rows, columns = rows[order], columns[order]
        beyond = (labels[rows, columns] == 0) & (p[rows, columns] > p_star[columns])
        kept = beyond | (np.arange(len(rows)) < top)
        rows, columns, beyond = rows[kept], columns[kept], beyond[kept]
        shares = _gradient_shares(groups, logits[rows, columns], columns)
        known = zip(*(x.tolist() for x in (rows, columns, labels[rows, columns], p[rows, columns],
                                           decisive[rows, columns], beyond, shares)))
        return [Mistake(row, column, label, score, calibrated if groups else None, discarded,
                        share if groups and not label else None)
                for row, column, label, score, calibrated, discarded, share in known]

    gaps = [probability_gap(scores, known)['gap'] for scores, known in zip(p.T, labels.T)]
    return Errors(
        reports=reports, ap=ap, counts=counts, gaps=np.array([*gaps, report['gap']]),
        histograms=np.stack([_histogram(scores, known) for scores, known in zip(p.T, labels.T)]), half=half,
        p_star=p_star, together=together, confused=confused[:MATRIX, :MATRIX], frequent=frequent, worst=worst[:MATRIX],
        pairs=[pair for pair in pairs if pair[2]],
        false_positives=mistakes_of(wrong, -1), false_negatives=mistakes_of(missed, 1))


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest values, in falling order; of equal ones the first, and none of 0."""
    order = (-values).argsort(kind='stable')[:count]
    return order[values[order] > 0]


def _products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Rows in which both are true, for each pair of columns; float32 counts exactly up to 2^24."""
    return left.T.astype(np.float32) @ right.astype(np.float32)


def _histogram(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    bins = np.maximum(np.ceil(scores.astype(np.float64) * BINS).astype(int) - 1, 0)
    return np.stack([np.bincount(bins[labels == y], minlength=BINS) for y in (0, 1)])


def _by_setting(settings: Mapping[str, Any] | None, classes: int) -> dict[Setting, np.ndarray]:
    """The classes of each setting, bool (C,).

    Parameters given per class are rounded to two decimals, so that there are fewer settings to analyse: p* moves by
    less than a hundredth.
    """
    if settings is None:
        return {}
    values = {name: value.double().numpy() for name, value in settings.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in settings.items() if name not in values}
    rounded = [np.broadcast_to(value.round(2 if value.ndim else 6), classes) for value in values.values()]
    distinct, which = np.unique(np.stack(rounded, axis=1), axis=0, return_inverse=True)
    return {Setting(**plain, **dict(zip(values, row.tolist()))): which.ravel() == k for k, row in enumerate(distinct)}


def _p_star(groups: Mapping[Setting, np.ndarray], classes: int) -> np.ndarray:
    p_star = np.full(classes, np.nan)
    for setting, members in groups.items():
        properties = analyse(setting)
        if properties.discards_mislabelled and properties.p_star is not None:
            p_star[members] = properties.p_star
    return p_star


def _gradient_shares(groups: Mapping[Setting, np.ndarray], logits: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Gradient of each negative over the largest possible; NaN without a setting."""
    shares = np.full(len(logits), np.nan)
    p = torch.from_numpy(logits).double().sigmoid()
    for setting, members in groups.items():
        properties, chosen = analyse(setting), members[columns]
        shares[chosen] = properties.remaining  # at p = 1
        chosen &= (p < 1).numpy()
        shares[chosen] = loss_and_gradient(p[chosen], setting)[1] / properties.peak if chosen.any() else 0
    return shares


def candidates(errors: Errors, results: Results) -> list[dict[str, object]]:
    """The labels to look at again, one row each, in the order of the page."""
    return [dict(image=results.images[m.row], **{'class': results.classes[m.column]}, label=m.label, p=f'{m.p:.6g}',
                 posterior='' if m.posterior is None else f'{m.posterior:.6g}', beyond_p_star=int(m.beyond),
                 gradient='' if m.gradient is None else f'{m.gradient:.4g}')
            for m in (*errors.false_positives, *errors.false_negatives)]


def thumbnail(path: str, size: int = 160) -> str | None:
    """A data URI of the image, ``size`` pixels at most; None where it cannot be read."""
    try:
        with Image.open(io.BytesIO(fileio.get(path))) as image:
            image.draft('RGB', (2 * size, 2 * size))
            small = ImageOps.exif_transpose(image).convert('RGB')
        small.thumbnail((size, size))
        file = io.BytesIO()
        small.save(file, 'JPEG', quality=80)
    except Exception:  # Pillow has a kind of its own for every way in which a file is broken
        return None
    return 'data:image/jpeg;base64,' + base64.b64encode(file.getvalue()).decode()


def render(errors: Errors, results: Results, facts: Mapping[str, str], top: int = 60,
           progress: Callable[[Sequence[str], str], Iterable[str]] = lambda items, what: items) -> str:
    """The page.

    Args:
        errors, results: What :func:`analyse_errors` returned and got.
        facts: What stands at the head of the page: ``config``, ``checkpoint`` and the like.
        top: Mistakes of either kind that are drawn.
        progress: Wraps the loop over the images that are read, and is told its name.
    """
    shown = _shown(errors)
    drawn = errors.false_positives[:top], errors.false_negatives[:top]
    paths = sorted({results.images[mistake.row] for kind in drawn for mistake in kind} - {''})
    pictures = {path: thumbnail(path) for path in progress(paths, 'thumbnails')}
    title = escape(f'Errors of {facts.get("config", "the model")}')
    return '\n'.join([
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        ('<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
         'style-src \'unsafe-inline\'; script-src \'unsafe-inline\'">'),
        f'<style>{STYLE}</style></head>\n<body><header><h1>{title}</h1>', _head(errors, results, facts),
        ('<nav><a href="#classes">Classes</a> <a href="#thresholds">Thresholds</a> <a href="#pairs">Pairs</a> '
         '<a href="#mistakes">Mistakes</a></nav></header>\n<main>'),
        _class_table(errors, results, shown), _charts(results, shown), _pairs(errors, results),
        _galleries(results, drawn, pictures), '</main>', _data(errors, shown),
        f'<script>{SCRIPT}</script></body></html>\n'])


def _shown(errors: Errors) -> np.ndarray:
    """Classes of the table, from low to high AP: all, or those of lowest AP and those of most positives."""
    order = errors.ap.argsort(kind='stable')  # NaN, without positives, is last
    if order.size <= CLASSES:
        return order
    kept = np.concatenate([order[:CLASSES // 2], (-errors.counts[2]).argsort(kind='stable')[:CLASSES // 2]])
    return order[np.isin(order, kept)]


def _head(errors: Errors, results: Results, facts: Mapping[str, str]) -> str:
    counts = [f'{(results.labels == value).sum():,} {name}'
              for value, name in ((1, 'positive'), (0, 'negative'), (-1, 'ignored'))]
    facts = {**facts, 'images': f'{len(results.labels):,}', 'classes': f'{len(results.classes):,}',
             'labels': ', '.join(counts)}
    figures = [(name, name, '.1f') for name in FIGURES] + [
        ('probability gap', 'gap', '+.3f'), ('calibration error', 'ECE', '.3f')]
    rows = [[name, *(_cell(report[key], form) for report in errors.reports.values())] for name, key, form in figures]
    return '\n'.join([
        '<dl>' + ''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in facts.items()) + '</dl>',
        _table('Metrics of labels predicted at', ['metric', *map(escape, errors.reports)], rows,
               'Percent; gap and calibration error as fractions.'), f'<p>{_rule(errors, results)}</p>'])


def _rule(errors: Errors, results: Results) -> str:
    """How labels are decided here, and what the loss makes of confident false positives, in words."""
    if results.settings is None:
        return ('Below, labels are predicted at p &gt; 1/2. This loss has no posterior in closed form, and no p* is '
                'known beyond which it would discard negatives.')
    text = f'Below, labels are predicted where the posterior exceeds 1/2: at p &gt; {_span(errors.half)}. '
    if np.isnan(errors.p_star).all():
        return text + 'This setting discards no negatives: the gradient does not go to 0 with 1 - p.'
    return text + (f'Beyond p* = {_span(errors.p_star)} the gradient of a negative falls toward 0: the loss takes it '
                   'for mislabelled and learns less and less from it (Sec. 2.5 of arXiv 2009.14119).')


def _span(values: np.ndarray) -> str:
    low, high = f'{np.nanmin(values):.3f}', f'{np.nanmax(values):.3f}'
    return low if low == high else f'{low} to {high}'


def _class_table(errors: Errors, results: Results, shown: np.ndarray) -> str:
    tp, predicted, positive = errors.counts
    with np.errstate(invalid='ignore'):
        shares = [errors.ap, 100 * tp / predicted, 100 * tp / positive, 200 * tp / (predicted + positive)]
    rows = [[f'<a href="#thresholds" data-class="{rank}">{escape(results.classes[c])}</a>', _cell(positive[c]),
             *(_cell(values[c], '.1f', bar=values[c] / 100) for values in shares), _cell(predicted[c] - tp[c]),
             _cell(positive[c] - tp[c]), _cell(errors.gaps[c], '+.2f')] for rank, c in enumerate(shown)]
    heads = ['class', 'positives', 'AP', 'precision', 'recall', 'F1', 'false positives', 'false negatives', 'gap']
    note = 'Percent. A heading sorts; a class opens its curves. Gap: mean p of positives minus mean 1 - p of negatives.'
    if len(shown) < errors.ap.size:
        note = (f'{len(shown):,} of {errors.ap.size:,} classes: the {CLASSES // 2} of lowest AP and the {CLASSES // 2} '
                f'of most positives; all sums are of all classes. {note}')
    return '\n'.join([
        '<section id="classes"><h2>Classes</h2>',
        '<p><label>Only classes with <input type="search" id="filter"> in their name</label></p>',
        _table('Classes', heads, rows, note, sort='AP'), '</section>'])


def _galleries(results: Results, drawn: tuple[list[Mistake], list[Mistake]],
               pictures: Mapping[str, str | None]) -> str:
    titles = ('False positives of highest p: labels that may be missing',
              'False negatives of lowest p: labels that may be too many')
    parts = ['<section id="mistakes"><h2>The most confident mistakes</h2>']
    for title, mistakes in zip(titles, drawn):
        parts += [f'<h3>{title}</h3>', '<div class="gallery">' if mistakes else '<p>None.</p><div>',
                  *(_figure(results, mistake, pictures) for mistake in mistakes), '</div>']
    unread = [path for path, picture in pictures.items() if picture is None]
    if unread:
        parts.append(f'<p>{len(unread)} images could not be read, first {escape(unread[0])}.</p>')
    return '\n'.join([*parts, '</section>'])


def _figure(results: Results, mistake: Mistake, pictures: Mapping[str, str | None]) -> str:
    path = results.images[mistake.row]
    name = escape(path.replace('\\', '/').rsplit('/', 1)[-1] or f'image {mistake.row}')
    picture = pictures.get(path)
    image = f'<img src="{picture}" alt="{name}" loading="lazy">' if picture else '<div class="none">no picture</div>'
    text = f'labelled {"yes" if mistake.label else "no"}, p {mistake.p:.3f}'
    if mistake.posterior is not None:
        text += f', posterior {mistake.posterior:.3f}'
    if mistake.gradient is not None:
        text += f', gradient {mistake.gradient:.0%} of its peak'
    mark = ' <mark>beyond p*</mark>' if mistake.beyond else ''
    return (f'<figure>{image}<figcaption><b>{escape(results.classes[mistake.column])}</b>{mark}<br>{text}<br>'
            f'<span class="file" title="{escape(path)}">{name}</span></figcaption></figure>')


def _charts(results: Results, shown: np.ndarray) -> str:
    options = ''.join(f'<option value="{rank}">{escape(results.classes[c])}</option>' for rank, c in enumerate(shown))

    def svg(name: str, label: str) -> str:
        return (f'<figure class="chart"><svg id="{name}" viewBox="0 0 420 256" role="img" aria-label="{label}"></svg>'
                f'<figcaption>{label}</figcaption></figure>')

    return '\n'.join([
        '<section id="thresholds"><h2>Thresholds and probabilities</h2>',
        f'<p><label>Labels of <select id="class"><option value="{len(shown)}">all classes together (micro)</option>',
        f'{options}</select></label>',
        f'<label>predicted at p &gt; <input type="range" id="threshold" min="0" max="{BINS - 1}"></label></p>',
        '<p><output id="reading" for="class threshold">The charts need JavaScript.</output></p>',
        '<div class="charts">', svg('curves', 'Precision, recall and F1 by threshold of p'),
        svg('histogram', 'Labels by p, logarithmic'), '</div></section>'])


def _pairs(errors: Errors, results: Results) -> str:
    def names(classes: np.ndarray) -> list[str]:
        return [escape(results.classes[c]) for c in classes]

    listed = [[escape(results.classes[a]), f'<td class="name">{escape(results.classes[b])}</td>', _cell(count)]
              for a, b, count in errors.pairs]
    paired = min(PAIRED, len(results.classes))
    together = _matrix(names(errors.frequent), 100 * errors.together, 'Labels that occur together', 'label',
                       'Of the images with the label of the row, the percentage that has that of the column too; the '
                       f'{len(errors.frequent)} most frequent classes.')
    confused = _matrix(names(errors.worst), errors.confused, 'Mistakes that occur together', 'missed',
                       'Images in which the label of the row was missed and that of the column wrongly predicted; the '
                       f'{len(errors.worst)} classes of most mistakes.')
    return '\n'.join(['<section id="pairs"><h2>Pairs</h2>', confused, _table(
        'Most frequent pairs of mistakes', ['missed', 'predicted', 'images'], listed,
        f'Among the {paired:,} classes of most mistakes.'), together, '</section>'])


def _matrix(names: Sequence[str], values: np.ndarray, title: str, corner: str, note: str) -> str:
    largest = np.nanmax(np.where(np.eye(len(values), dtype=bool), 0, values), initial=0) or 1
    rows = [[name, *('<td></td>' if i == j else _cell(value, '.0f', heat=value / largest)
                     for j, value in enumerate(row))] for i, (name, row) in enumerate(zip(names, values))]
    return _table(title, [corner, *(f'<span>{name}</span>' for name in names)], rows, note, kind='matrix')


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], note: str, kind: str = '',
           sort: str = '') -> str:
    """A table that scrolls by itself. The first cell of a row is its heading; those behind it are td elements.

    With ``sort``, the name of the column that it is sorted by, its headings are buttons.
    """
    def head(name: str) -> str:
        if not sort:
            return f'<th scope="col">{name}</th>'
        order = ' aria-sort="ascending"' if name == sort else ''
        return f'<th scope="col"{order}><button type="button">{name}</button></th>'

    body = '\n'.join(f'<tr><th scope="row">{row[0]}</th>{"".join(row[1:])}</tr>' for row in rows)
    return (f'<p><b>{title}</b>. <span class="note">{note}</span></p>\n'
            f'<div class="scroll {kind}" role="region" tabindex="0" aria-label="{title}"><table>'
            f'<thead><tr>{"".join(map(head, heads))}</tr></thead>\n<tbody>{body}</tbody></table></div>')


def _cell(value: float, form: str = ',', bar: float | None = None, heat: float | None = None) -> str:
    """A cell that sorts by its number, with a bar or a colour for a share of 1; NaN is a dash and sorts last."""
    if np.isnan(value):
        return '<td>–</td>'
    name, share = ('bar', bar) if heat is None else ('heat', heat)
    style = '' if share is None else f' class="{name}" style="--v:{share:.3g}"'
    return f'<td data-v="{value:.6g}"{style}>{value:{form}}</td>'


def _data(errors: Errors, shown: np.ndarray) -> str:
    """What the charts are drawn from: for each class shown, and last for all, the histograms and marks."""
    def finite(values: np.ndarray) -> list[float | None]:
        return [None if np.isnan(value) else round(float(value), 4) for value in values]

    def common(values: np.ndarray) -> np.ndarray:
        """Those of the classes shown, and the one that all classes have, if it is one."""
        return np.append(values[shown], values[0] if (values == values[0]).all() else np.nan)

    data = dict(rule=next(iter(errors.reports)),
                counts=[*errors.histograms[shown].tolist(), errors.histograms.sum(0).tolist()],
                half=finite(common(errors.half)), star=finite(common(errors.p_star)),
                gap=finite(np.append(errors.gaps[shown], errors.gaps[-1])))
    return f'<script type="application/json" id="data">{json.dumps(data, separators=(",", ":"))}</script>'


STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --link: #0a58ca;
  --one: #0a66c2; --two: #c2410c; --three: #15803d; --hot: #f59e0b; --mark: #fde68a; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --ink: #e6e9ed; --soft: #9aa4af; --line: #343b43;
  --link: #7ab7ff; --one: #6cb2ff; --two: #ff9a66; --three: #6fd08c; --hot: #b45309; --mark: #7a5200; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
a { color: var(--link); }
nav a { margin-right: 1rem; }
:focus-visible { outline: 3px solid var(--one); outline-offset: 1px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }
dt, figcaption, .note { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow: auto; max-height: 36rem; margin: .5rem 0 1.5rem; }
.matrix { max-height: none; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child { text-align: left; max-width: min(16rem, 40vw); }
th:first-child, .matrix thead span, .file { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
th { position: sticky; left: 0; background: var(--ground); }
thead th { top: 0; left: auto; z-index: 1; vertical-align: bottom; }
thead th:first-child { left: 0; z-index: 2; }
.name { text-align: left; }
th button { all: unset; cursor: pointer; font-weight: bold; }
th button:focus-visible { outline: 3px solid var(--one); }
[aria-sort=ascending] button::after { content: " ▲"; }
[aria-sort=descending] button::after { content: " ▼"; }
.bar { min-width: 6rem;
  background: linear-gradient(var(--one), var(--one)) left bottom / calc(var(--v) * 100%) 3px no-repeat; }
.heat { background: color-mix(in srgb, var(--hot) calc(var(--v) * 100%), var(--ground)); }
.heat[data-v="0"] { color: var(--soft); }
.matrix th, .matrix td { padding: .1rem .3rem; font-size: .85rem; }
.matrix thead span { writing-mode: vertical-rl; max-height: 9rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 1rem; }
figure { margin: 0; font-size: .85rem; line-height: 1.35; min-width: 0; }
.gallery img, .none { width: 100%; height: 150px; object-fit: contain; background: var(--line); border-radius: 4px; }
.none { display: grid; place-items: center; color: var(--soft); }
figcaption b { color: var(--ink); }
.file { display: block; }
mark { background: var(--mark); color: inherit; padding: 0 .3em; border-radius: 3px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; }
svg .grid { stroke: var(--line); }
svg .mark { stroke: var(--ink); stroke-dasharray: 2 3; }
svg .reading { stroke: var(--soft); stroke-width: 2; }
svg path { fill: none; stroke-width: 2; }
svg .one { stroke: var(--one); } svg .two { stroke: var(--two); stroke-dasharray: 7 3; }
svg .three { stroke: var(--three); stroke-dasharray: 2 2; }
svg text.one, svg text.two, svg text.three { stroke: none; }
svg text.one { fill: var(--one); } svg text.two { fill: var(--two); } svg text.three { fill: var(--three); }
input, select, button { font: inherit; color: inherit; max-width: 100%; }
"""

SCRIPT = r"""
'use strict';
const $ = id => document.getElementById(id), data = JSON.parse($('data').textContent);
const BINS = data.counts[0][0].length, LEFT = 40, TOP = 34, WIDTH = 370, HEIGHT = 200;
const x = p => LEFT + WIDTH * p, y = v => TOP + HEIGHT * (1 - v);
const percent = v => v === null ? '–' : (100 * v).toFixed(1) + ' %', KINDS = ['one', 'two', 'three'];

// Tables: a heading sorts by its column, first downward; what has no number stays last.
const table = document.querySelector('#classes table'), heads = [...table.tHead.rows[0].cells];
heads.forEach((head, column) => head.firstChild.addEventListener('click', () => {
  const down = head.ariaSort ? head.ariaSort === 'ascending' : column > 0, sign = down ? -1 : 1;
  heads.forEach(other => other.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const key = row => column ? parseFloat(row.cells[column].dataset.v) : row.cells[0].textContent;
  const rows = [...table.tBodies[0].rows].map(row => [key(row), row]);
  rows.sort(([a], [b]) => column ? isNaN(a) - isNaN(b) || sign * (a - b) || 0 : sign * a.localeCompare(b));
  table.tBodies[0].append(...rows.map(([, row]) => row));
}));
$('filter').addEventListener('input', event => {
  const text = event.target.value.toLowerCase();
  for (const row of table.tBodies[0].rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(text);
});

// Charts: precision, recall and F1 follow from the histograms, whose bins end at the thresholds.
const line = (x1, y1, x2, y2, name) => `<line class="${name}" x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}"/>`;
const text = (x, y, anchor, words, name = '') =>
  `<text class="${name}" x="${x}" y="${y}" text-anchor="${anchor}">${words}</text>`;
function frame(ticks, labels) {
  let out = '';
  for (const [value, name] of ticks)
    out += line(LEFT, y(value), LEFT + WIDTH, y(value), 'grid') + text(LEFT - 4, y(value) + 4, 'end', name);
  for (const p of [0, 0.2, 0.4, 0.6, 0.8, 1]) out += text(x(p), TOP + HEIGHT + 15, 'middle', p);
  labels.forEach((label, i) => out += text(LEFT + 110 * i, 12, 'start', label, KINDS[i]));
  return out;
}
function path(points, name) {
  let d = '', pen = false;
  for (const [p, value] of points) {
    if (value === null) { pen = false; continue; }
    d += `${pen ? 'L' : 'M'}${x(p).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = true;
  }
  return `<path class="${name}" d="${d}"/>`;
}
function curves([negative, positive]) {
  const all = positive.reduce((a, b) => a + b, 0), found = [];
  let tp = 0, fp = 0;
  for (let k = BINS - 1; k >= 0; k--) {
    tp += positive[k]; fp += negative[k];
    found[k] = [[tp, tp + fp], [tp, all], [2 * tp, tp + fp + all]].map(([part, whole]) => whole ? part / whole : null);
  }
  return found;
}
function draw() {
  const index = +$('class').value, k = +$('threshold').value, found = curves(data.counts[index]);
  const best = found.reduce((top, now, i) => (now[2] ?? -1) > (found[top][2] ?? -1) ? i : top, 0);
  let marks = '';
  for (const [p, name] of [[data.half[index], data.rule], [data.star[index], 'p*']])
    if (p !== null)
      marks += line(x(p), TOP, x(p), TOP + HEIGHT, 'mark') + text(x(p), TOP - 5, 'middle', name);
  const cursor = line(x(k / BINS), TOP, x(k / BINS), TOP + HEIGHT, 'reading');
  $('curves').innerHTML = frame([0, 20, 40, 60, 80, 100].map(v => [v / 100, v]), ['precision', 'recall', 'F1'])
    + KINDS.map((kind, j) => path(found.map((f, i) => [i / BINS, f[j]]), kind)).join('') + marks + cursor;
  const largest = Math.max(10, ...data.counts[index].flat()), log = n => Math.log10(1 + n) / Math.log10(1 + largest);
  const ticks = [[0, 0]];
  for (let n = 1; n <= largest; n *= 10) ticks.push([log(n), n.toLocaleString('en')]);
  const steps = counts => counts.flatMap((n, i) => [[i / BINS, log(n)], [(i + 1) / BINS, log(n)]]);
  $('histogram').innerHTML = frame(ticks, ['negatives', 'positives'])
    + data.counts[index].map((counts, i) => path(steps(counts), KINDS[i])).join('') + marks + cursor;
  const [precision, recall, f1] = found[k].map(percent), gap = data.gap[index];
  $('reading').textContent = `p > ${(k / BINS).toFixed(2)}: precision ${precision}, recall ${recall}, F1 ${f1}. `
    + `Best F1 ${percent(found[best][2])} at p > ${(best / BINS).toFixed(2)}. `
    + `Probability gap ${gap === null ? '–' : gap.toFixed(3)}.`;
}
function start() {
  $('threshold').value = Math.round(BINS * (data.half[+$('class').value] ?? 0.5));
  draw();
}
$('class').addEventListener('change', start);
$('threshold').addEventListener('input', draw);
for (const link of document.querySelectorAll('a[data-class]'))
  link.addEventListener('click', () => { $('class').value = link.dataset.class; start(); });
start();
"""
