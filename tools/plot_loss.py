"""Plot the loss and the normalised gradient over the probability, and print Table 1 of arXiv 2009.14119.

Without settings, these are Fig. 2 and 3 of the paper, with gamma 2 and margin 0.2. The first curve is cross-entropy.
The marked regimes are those of the last setting.
"""
import argparse
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import matplotlib
from mmengine.config import Config

from mmasl.analysis.gradient import Setting
from mmasl.analysis.loss_plots import (
    CE,
    FIGURE_2,
    FIGURE_3,
    draw_gradient,
    draw_loss,
    group_by_form,
    render_table,
    save_figure,
)
from mmasl.errors import ConfigError
from mmasl.models.losses import AsymmetricLoss
from mmasl.utils.tools import exit_on_user_error, require_file

matplotlib.use('Agg')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--setting', type=parse_setting, action='append', default=[],
                        metavar='[GAMMA_POS,]GAMMA_NEG,CLIP', help='a setting, as in 4,0.05 or 1,4,0.05 (gamma_pos is '
                        '0 by default); repeat for more curves')
    parser.add_argument('--config', help='plot every mmasl.AsymmetricLoss of this config file')
    parser.add_argument('--detach-focusing', choices=('False', 'True', 'both'),
                        help='gradient through the focusing weight (False, Eq. 8) or with a constant weight (True); '
                        'default: as in the config, and False for --setting')
    parser.add_argument('--positives', action='store_true', help='also plot positives')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/plot_loss'),
                        help='folder for loss.svg and gradient.svg, or one .svg or .png file for both (default: '
                        '%(default)s)')
    return parser.parse_args(argv)


def parse_setting(text: str) -> Setting:
    try:
        numbers = [float(number) for number in text.split(',')]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 3):
        raise argparse.ArgumentTypeError(f'{text!r}: give GAMMA_NEG,CLIP or GAMMA_POS,GAMMA_NEG,CLIP, as in 4,0.05')
    try:
        gamma_pos, gamma_neg, clip = [0.] * (3 - len(numbers)) + numbers
        return Setting(gamma_pos, gamma_neg, clip)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text}: {error}') from None


def read_settings(config: str) -> list[Setting]:
    """Read the setting of every mmasl.AsymmetricLoss in a config."""
    require_file(config, 'config')
    settings = []
    for key, loss in iter_losses(dict(Config.fromfile(config))):
        try:
            settings.append(Setting(**{f.name: loss[f.name] for f in fields(Setting) if f.name in loss}))
        except ConfigError as error:
            raise ConfigError(f'{config}, {key}: {error}') from None
    if not settings:
        raise ConfigError(f"{config} has no loss with type='mmasl.AsymmetricLoss', including the scope: give another "
                          'config, or --setting')
    return settings


def iter_losses(node: object, key: str = '') -> Iterator[tuple[str, dict]]:
    """Key and dict of every mmasl.AsymmetricLoss in a config."""
    if isinstance(node, dict):
        kind = node.get('type')
        if kind == 'mmasl.AsymmetricLoss' or (isinstance(kind, type) and issubclass(kind, AsymmetricLoss)):
            yield key, node
        for name, inner in node.items():
            yield from iter_losses(inner, f'{key}.{name}'.lstrip('.'))
    elif isinstance(node, (list, tuple)):
        for number, inner in enumerate(node):
            yield from iter_losses(inner, f'{key}.{number}')


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.out.suffix not in ('', '.svg', '.png'):
        raise ConfigError(f'--out {args.out}: give an .svg or .png file, or a folder, without a suffix')
    settings = args.setting + (read_settings(args.config) if args.config else [])
    groups = group_by_form(settings or FIGURE_3, args.detach_focusing)
    values = list(dict.fromkeys(replace(s, detach_focusing=False) for s in [CE, *settings])) if settings else FIGURE_2
    print(render_table([s for group in groups.values() for s in group]))

    losses = [(draw_loss, values)]
    gradients = [(draw_gradient, group) for group in groups.values()]
    folder = args.out.parent if args.out.suffix else args.out
    folder.mkdir(parents=True, exist_ok=True)
    figures = {args.out: losses + gradients} if args.out.suffix else {
        folder / 'loss.svg': losses, folder / 'gradient.svg': gradients}
    for path, panels in figures.items():
        save_figure(panels, args.positives, path)
    print(f'\nFigures: {", ".join(map(str, figures))}')


if __name__ == '__main__':
    main()
