"""The error page: what it counts against loops and autograd, its structure, its size, and its script in a browser."""
import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from mmasl.analysis.error_analysis import BINS, MATRIX_CLASSES, Predictions, analyse_errors, list_suspects
from mmasl.analysis.error_page import render_error_page, thumbnail
from mmasl.analysis.gradient import Setting, analyse_gradient
from mmasl.evaluation.functional import average_precision
from mmasl.ops import posterior, reference

ASL = dict(gamma_neg=torch.tensor(4.), clip=torch.tensor(0.05), detach_focusing=False, gamma_pos=torch.tensor(0.),
           alpha=None)
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


def predict(count: int = 60, number: int = 5, settings: dict | None = ASL, **kwargs) -> Predictions:
    """Random logits of ``count`` images, that labels agree with by and large, some of them ignored."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 3, (count, number)).astype(np.float32)
    labels = (logits + rng.normal(0, 2.5, logits.shape) > 0.5).astype(np.int8)
    labels[rng.random(labels.shape) < 0.1] = -1
    kwargs = dict(images=[''] * count, classes=[f'class {c}' for c in range(number)]) | kwargs
    return Predictions(logits, labels, settings=settings, **kwargs)


def decided(found: Predictions) -> np.ndarray:
    logits = torch.from_numpy(found.logits)
    return (logits.sigmoid() if found.settings is None else posterior(logits, **found.settings)).numpy() > 0.5


# --- counts

@pytest.mark.parametrize('settings', [None, ASL], ids=['bce', 'asl'])
def test_counts_of_classes(settings):
    data = predict(settings=settings)
    errors, predicted = analyse_errors(data), decided(data)
    for c in range(5):
        known = [(bool(predicted[n, c]), int(data.labels[n, c])) for n in range(60) if data.labels[n, c] >= 0]
        assert errors.counts[:, c].tolist() == [known.count((True, 1)), sum(x for x, _ in known),
                                                sum(y for _, y in known)]
    assert errors.ap == pytest.approx(100 * average_precision(data.logits, data.labels))
    assert list(errors.reports) == ['p > 1/2'] if settings is None else ['posterior > 1/2', 'p > 1/2']
    tp, chosen, positive = errors.counts.sum(1)
    first = next(iter(errors.reports.values()))
    assert first['OP'] == pytest.approx(100 * tp / chosen) and first['OR'] == pytest.approx(100 * tp / positive)
    assert errors.half == pytest.approx(0.5 if settings is None else 0.6837, abs=1e-3)


def test_thresholds_of_the_checkpoint_decide():
    thresholds = np.float32([0.1, 0.3, 0.5, 0.7, 0.9])
    for settings in (None, ASL):
        data = predict(settings=settings)._replace(thresholds=thresholds)
        errors = analyse_errors(data)
        predicted = 1 / (1 + np.exp(-data.logits)) >= thresholds
        expected = [(predicted & (data.labels == 1)).sum(0), (predicted & (data.labels >= 0)).sum(0)]
        assert errors.counts[:2].tolist() == np.array(expected).tolist()
        assert next(iter(errors.reports)) == 'p at its threshold' and len(errors.reports) == 2 + (settings is not None)
        assert errors.half.tolist() == thresholds.tolist()
        assert 'from the thresholds of the checkpoint on: at p of 0.100 to 0.900' in render_error_page(errors, data, {})


def test_histograms_count_what_lies_above_a_threshold():
    data = predict(200)
    data.logits[:3] = [[40.], [-120.], [0.]]  # p of 1, 0 and 1/2
    histograms = analyse_errors(data).histograms
    p = torch.from_numpy(data.logits).sigmoid().double().numpy()
    assert p.max() == 1 and p.min() == 0
    for y in (0, 1):
        assert (histograms[:, y].sum(1) == (data.labels == y).sum(0)).all()
        for k in range(1, BINS):
            assert (histograms[:, y, k:].sum(1) == ((p > k / BINS) & (data.labels == y)).sum(0)).all()


def test_gaps():
    data = predict(settings=None)
    p = 1 / (1 + np.exp(-data.logits))
    gaps = [p[data.labels[:, c] == 1, c].mean() - (1 - p[data.labels[:, c] == 0, c]).mean() for c in range(5)]
    gaps.append(p[data.labels == 1].mean() - (1 - p[data.labels == 0]).mean())
    assert analyse_errors(data).gaps == pytest.approx(gaps, abs=1e-5)


def test_pairs():
    data = predict(600, 4)
    errors, predicted = analyse_errors(data), decided(data)
    missed, wrong = ~predicted & (data.labels == 1), predicted & (data.labels == 0)
    mistakes = (missed | wrong).sum(0)
    assert mistakes[errors.worst].tolist() == sorted(mistakes, reverse=True)
    expected = {}
    for i, a in enumerate(errors.worst):
        for j, b in enumerate(errors.worst):
            count = sum(missed[n, a] and wrong[n, b] for n in range(600))
            assert errors.confused[i, j] == count
            if count:
                expected[int(a), int(b)] = count
    assert {(a, b): count for a, b, count in errors.pairs} == expected and len(expected) > 3
    assert [pair[2] for pair in errors.pairs] == sorted(expected.values(), reverse=True)
    for i, a in enumerate(errors.frequent):
        for j, b in enumerate(errors.frequent):
            both = [data.labels[n, b] for n in range(600) if data.labels[n, a] == 1 and data.labels[n, b] >= 0]
            assert errors.together[i, j] == pytest.approx(np.mean(both))


# --- mistakes

def by_hand(data: Predictions, label: int) -> list[tuple[int, int]]:
    predicted, sign = decided(data), 1 if label else -1
    found = [(sign * data.logits[n, c], n, c) for n in range(60) for c in range(5)
             if data.labels[n, c] == label and predicted[n, c] != label]
    return [(n, c) for _, n, c in sorted(found)]


def test_the_most_confident_mistakes_come_first():
    data = predict(settings=None)
    errors = analyse_errors(data, top=7)
    for label, mistakes in ((0, errors.false_positives), (1, errors.false_negatives)):
        assert [(m.row, m.column) for m in mistakes] == by_hand(data, label)[:7]
        for m in mistakes:
            assert m.label == label == data.labels[m.row, m.column] and m.posterior is None and m.gradient is None
            assert m.p == pytest.approx(1 / (1 + np.exp(-data.logits[m.row, m.column]))) and not m.beyond_p_star


def test_all_false_positives_beyond_p_star_are_kept():
    data = predict()
    errors, p_star = analyse_errors(data, top=1), analyse_gradient(Setting()).p_star
    assert errors.p_star == pytest.approx(p_star) and p_star == pytest.approx(0.9, abs=0.01)
    expected = by_hand(data, 0)
    beyond = [1 / (1 + np.exp(-data.logits[n, c])) > p_star for n, c in expected]
    assert [(m.row, m.column) for m in errors.false_positives] == [x for x, far in zip(expected, beyond) if far]
    assert sum(beyond) > 3 and all(m.beyond_p_star for m in errors.false_positives)
    assert len(errors.false_negatives) == 1 and not errors.false_negatives[0].beyond_p_star


@pytest.mark.parametrize('gamma_neg', [4., [0.5, 1., 2., 3., 4.]], ids=['one', 'classes'])
def test_gradient_of_a_mistake(gamma_neg):
    """Its share of the peak, from autograd of the paper's equations."""
    data = predict(settings=dict(ASL, gamma_neg=torch.tensor(gamma_neg)))
    errors = analyse_errors(data)
    grid = torch.linspace(-10, 20, 30001, dtype=torch.float64)
    for m in errors.false_positives[::5]:
        gamma = gamma_neg if isinstance(gamma_neg, float) else gamma_neg[m.column]
        z = torch.cat([grid, torch.tensor([data.logits[m.row, m.column]]).double()]).requires_grad_()
        reference.asymmetric_loss(z, torch.zeros_like(z), gamma_pos=0., gamma_neg=gamma, clip=0.05).sum().backward()
        assert m.gradient == pytest.approx((z.grad[-1] / z.grad.max()).item(), rel=1e-4)
        assert m.beyond_p_star == (m.p > grid[z.grad[:-1].argmax()].sigmoid().item())
    if gamma_neg != 4.:
        assert np.unique(errors.p_star).size == 5 and np.unique(errors.half).size == 5


def test_a_setting_without_margin_discards_nothing():
    """The gradient of focal loss does not vanish for p -> 1, though it falls behind its peak."""
    errors = analyse_errors(predict(settings=dict(ASL, clip=torch.tensor(0.))))
    assert np.isnan(errors.p_star).all() and not any(m.beyond_p_star for m in errors.false_positives)
    assert all(m.gradient > 0.5 for m in errors.false_positives if m.p > 0.9)


def test_certain_mistakes():
    data = predict()
    data.logits[0], data.labels[0] = 200., 0  # p is 1 in float64 too
    worst = analyse_errors(data).false_positives[0]
    assert worst.p == 1 and worst.beyond_p_star and worst.gradient < 1e-100
    assert worst.posterior == pytest.approx(0.964, abs=1e-3)


def test_a_perfect_model_has_no_mistakes():
    labels = np.eye(3, dtype=np.int8)
    data = Predictions((20. * labels - 10).astype(np.float32), labels, [''] * 3, list('abc'), ASL)
    errors = analyse_errors(data)
    assert not errors.false_positives and not errors.false_negatives and not errors.pairs
    assert not list_suspects(errors, data)
    assert errors.confused.shape == (0, 0) and '<p>None.</p>' in render_error_page(errors, data, {})


def test_no_positive_label_at_all():
    data = predict()
    data.labels[:] = 0
    with pytest.raises(ValueError, match='(?i)no class has a positive label'):
        analyse_errors(data)


def test_suspects():
    data = predict(images=[f'{n}.png' for n in range(60)])
    errors = analyse_errors(data, top=3)
    rows = list_suspects(errors, data)
    assert len(rows) == len(errors.false_positives) + 3
    first, last = rows[0], rows[-1]
    worst = errors.false_positives[0]
    assert first == dict(image=f'{worst.row}.png', label=0, p=f'{worst.p:.6g}', posterior=f'{worst.posterior:.6g}',
                         beyond_p_star=1, gradient=f'{worst.gradient:.4g}', **{'class': f'class {worst.column}'})
    assert (last['label'], last['beyond_p_star'], last['gradient']) == (1, 0, '')


# --- thumbnails

def test_thumbnail(tmp_path):
    pixels = np.zeros((300, 600, 3), np.uint8)
    pixels[:, 300:] = (255, 0, 0)
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held upright: to be turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / 'a.jpg', exif=turned)
    uri = thumbnail(str(tmp_path / 'a.jpg'))
    small = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix('data:image/jpeg;base64,'))))
    assert small.size == (80, 160) and small.getpixel((40, 140))[0] > 200 and small.getpixel((40, 20))[0] < 50


@pytest.mark.parametrize('mode, colour', [('L', 7), ('RGBA', (1, 2, 3, 0)), ('P', 3), ('I;16', 900), ('1', 1)])
def test_thumbnail_of_any_mode(tmp_path, mode, colour):
    Image.new(mode, (20, 30), colour).save(tmp_path / 'a.png')
    assert thumbnail(str(tmp_path / 'a.png')).startswith('data:image/jpeg')


def test_thumbnail_of_16_bits(tmp_path):
    pixels = np.repeat(np.uint16([[100, 20000, 40000]]), 9, axis=0).repeat(9, axis=1)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    uri = thumbnail(str(tmp_path / 'a.png'))
    small = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix('data:image/jpeg;base64,'))))
    assert [small.getpixel((x, 4))[0] for x in (4, 13, 22)] == pytest.approx([0, 127, 255], abs=9)


@pytest.mark.parametrize('content', [None, b'', b'text', b'\x89PNG\r\n\x1a\n' + bytes(99)],
                         ids=['missing', 'empty', 'text', 'broken'])
def test_no_thumbnail_of_what_is_no_image(tmp_path, content):
    if content is not None:
        (tmp_path / 'a.png').write_bytes(content)
    assert thumbnail(str(tmp_path / 'a.png')) is None


# --- the page

VOID = {'meta', 'input', 'br', 'img'}


class Page(HTMLParser):
    """Checks that tags nest, and keeps elements and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f'</{tag}> at {self.getpos()}'

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else '', data))

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    def said(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


HOSTILE = ['</script><script>alert(1)</script>', '<img src=x onerror=alert(1)>', '"\'&amp; <b>', 'déjà 標籤',
           '--><!--']


@pytest.fixture
def hostile(tmp_path):
    """Results whose names try to break out of the page, and a picture."""
    Image.new('RGB', (64, 48), 'green').save(tmp_path / 'a".png')
    data = predict(images=[str(tmp_path / 'a".png'), '', '<script>.png'] * 20, classes=HOSTILE)
    return data, render_error_page(analyse_errors(data), data, {'config': '<i>c.py', 'checkpoint': '&w.pth'})


def test_structure(hostile):
    data, text = hostile
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {'link', 'iframe', 'object', 'base', 'i'} and len(page.all('script')) == 2
    for tag, attributes in page.elements:
        assert not any(name.startswith('on') for name in attributes)
        for name in ('src', 'href', 'action', 'srcset'):
            assert attributes.get(name, '#').startswith(('#', 'data:image/jpeg;base64,')), (tag, attributes)
    assert "default-src 'none'" in text and not re.search(r'https?://|url\(|@import', text)
    ids = [attributes['id'] for _, attributes in page.elements if 'id' in attributes]
    assert len(ids) == len(set(ids))
    assert {x['href'][1:] for x in page.all('a')} <= set(ids)
    assert all('alt' in image for image in page.all('img')) and all('scope' in head for head in page.all('th'))
    assert all(x['tabindex'] == '0' and x['aria-label'] for x in page.all('div') if 'scroll' in x.get('class', ''))
    assert set(HOSTILE) <= set(page.said('a')) and set(HOSTILE) <= set(page.said('option'))
    assert page.said('title') == ['Errors of <i>c.py']
    unread = [text for text in page.said('p') if 'cannot be read' in text]
    assert len(unread) == 1 and '1 images cannot be read; the first is <script>.png.' in unread[0]
    errors = analyse_errors(data)
    drawn = [m.row for m in (*errors.false_positives, *errors.false_negatives)]
    assert len(page.all('img')) == sum(row % 3 == 0 for row in drawn) > 2


def test_charts_have_the_counts(hostile):
    data, text = hostile
    errors = analyse_errors(data)
    drawn = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert drawn['counts'][-1] == errors.histograms.sum(0).tolist() and len(drawn['counts']) == 6
    order = errors.ap.argsort()
    assert drawn['counts'][0] == errors.histograms[order[0]].tolist()
    assert drawn['half'] == pytest.approx([0.6837] * 6, abs=1e-3) and drawn['gap'][-1] == pytest.approx(
        errors.gaps[-1], abs=1e-4)


def test_words_of_the_rule():
    def said(settings):
        data = predict(settings=settings)
        return render_error_page(analyse_errors(data), data, {})

    assert 'no posterior in closed form' in said(None)
    assert 'at p &gt; 0.684. Beyond p* = 0.900 the gradient' in said(ASL)
    assert 'This setting discards no negatives' in said(dict(ASL, clip=torch.tensor(0.)))
    assert 'Beyond p* = 0.8' in said(dict(ASL, clip=torch.tensor([0.05, 0.05, 0.1, 0.1, 0.1])))


@pytest.mark.slow
def test_size_of_coco(tmp_path):
    """80 classes, 40,000 images, and thumbnails that do not compress."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'noise.png')
    data = predict(40000, 80, images=[str(tmp_path / 'noise.png')] * 40000)
    page = render_error_page(analyse_errors(data), data, {})
    assert len(page) < 10e6 and len(Page(page).all('img')) == 120


def test_many_classes_are_cut():
    classes = 1000
    data = predict(20, classes)
    data.labels[:, 100] = 0
    errors = analyse_errors(data)
    text = render_error_page(errors, data, {})
    assert len(text) < 1e6
    page = Page(text)
    shown = [int(name.split()[1]) for name in page.said('a') if name.startswith('class ')]
    assert 300 < len(shown) <= 400 and '1,000 classes' in text and len(page.all('option')) == len(shown) + 1
    ap = errors.ap[shown]
    assert (ap == np.sort(ap)).all() and ap[:200].max() <= np.sort(errors.ap)[199]
    frequent = np.sort(errors.counts[2])[-200]
    assert (errors.counts[2, shown] >= frequent).sum() >= 200 and len(errors.worst) == MATRIX_CLASSES


# --- in a browser

def browse(page: str, folder, script: str = '', width: int = 1200) -> Page:
    """The page after its script and ``script`` have run."""
    if CHROMIUM is None:
        pytest.skip('no chromium, chromium-browser or google-chrome on PATH: the page is not run in a browser')
    (folder / 'page.html').write_text(page.replace('</body>', f'<script>{script}</script></body>'))
    done = subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={folder}/profile',
                           f'--window-size={width},900', '--dump-dom', (folder / 'page.html').as_uri()],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return Page(done.stdout)


def test_browser(hostile, tmp_path):
    """Curves, sorting, filter, links and the slider, by their effects on the page."""
    data, text = hostile
    errors = analyse_errors(data)
    page = browse(text, tmp_path, """
      const rows = () => [...table.tBodies[0].rows].map(row => row.cells[1].textContent).join();
      const note = (name, value) => document.body.setAttribute('data-' + name, value);
      const button = n => document.querySelectorAll('#classes th button')[n];
      note('micro', $('reading').textContent);
      note('paths', document.querySelectorAll('svg path').length);
      button(1).click(); note('down', rows()); note('sort', heads[1].getAttribute('aria-sort'));
      button(1).click(); note('up', rows());
      button(1).focus(); note('focus', document.activeElement === button(1));
      $('filter').value = 'DÉJÀ'; $('filter').dispatchEvent(new Event('input'));
      note('left', [...table.tBodies[0].rows].filter(row => !row.hidden).length);
      document.querySelector('a[data-class="2"]').click(); note('class', $('class').value);
      $('threshold').value = 30; $('threshold').dispatchEvent(new Event('input'));
      note('at30', $('reading').textContent);
      note('wide', document.documentElement.scrollWidth > innerWidth);
    """, width=500)
    (body, ) = page.all('body')
    p = 1 / (1 + np.exp(-data.logits.astype(np.float64)))

    def reading(threshold: float, columns) -> str:
        chosen, y = p[:, columns] > threshold, data.labels[:, columns]
        tp, fp = (chosen & (y == 1)).sum(), (chosen & (y == 0)).sum()
        figures = tp / (tp + fp), tp / (y == 1).sum(), 2 * tp / (tp + fp + (y == 1).sum())
        precision, recall, f1 = (f'{100 * x:.1f} %' for x in figures)
        return f'p > {threshold:.2f}: precision {precision}, recall {recall}, F1 {f1}.'

    assert body['data-micro'].startswith(reading(0.68, slice(None)))
    assert body['data-micro'].endswith(f'Probability gap {errors.gaps[-1]:.3f}.')
    assert body['data-at30'].startswith(reading(0.30, [errors.ap.argsort()[2]])) and body['data-class'] == '2'
    positives = sorted(errors.counts[2].tolist())
    assert body['data-up'] == ','.join(map(str, positives)) and body['data-sort'] == 'descending'
    assert body['data-down'] == ','.join(map(str, positives[::-1]))
    assert (body['data-paths'], body['data-left'], body['data-focus'], body['data-wide']) == ('5', '1', 'true', 'false')


def test_browser_without_positives_or_predictions(tmp_path):
    data = predict(settings=None)
    data.labels[:, 0] = 0
    data.logits[:, 1] = -9
    page = browse(render_error_page(analyse_errors(data), data, {}), tmp_path, """
      $('class').value = [...$('class').options].find(option => option.text === 'class 0').value;
      $('class').dispatchEvent(new Event('change'));
      document.querySelectorAll('#classes th button')[2].click();
      document.body.dataset.last = table.tBodies[0].rows[4].cells[0].textContent;
    """)
    (output, ) = page.said('output')
    assert 'recall –' in output and 'Probability gap –' in output and page.all('body')[0]['data-last'] == 'class 0'
    assert not any('NaN' in attributes.get('d', '') for attributes in page.all('path'))
