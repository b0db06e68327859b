"""Configuration of the documentation site (`make docs`).

The site has README, CONTRIBUTING, CHANGELOG, the pages of docs/ and configs/, and a page for each module, written from
its docstrings. The source folder is the repository, so links work on the site as on GitHub.
"""
import importlib
import inspect
import os.path as osp
import pkgutil
import re
import shutil
import sys
from pathlib import Path

from mmcv.transforms.utils import cache_randomness

import mmasl
from mmasl import registry

ROOT = Path(__file__).parents[1]
API = ROOT / 'docs' / 'api'
NAVIGATION = {  # pages, or 'title <page>'; the build fails on a page that is not listed or does not exist
    'Start': ['Overview <self>', 'docs/install', 'docs/stock_configs', 'docs/choosing'],
    'Losses': ['docs/loss', 'docs/implementations'],
    'Heads': ['docs/heads'],
    'Data and metrics': ['Data sets <docs/api/mmasl.datasets>', 'docs/evaluation',
                         'Metrics <docs/api/mmasl.evaluation>'],
    'Training': ['configs/README', 'docs/recipes', 'docs/weights', 'docs/reproduce'],
    'Analysis': ['docs/analysis'],
    'Inference': ['docs/inference', 'docs/errors'],
    'Speed and scale': ['docs/speed', 'docs/scale'],
    'Faults': ['docs/faults'],
    'API reference': ['docs/api/mmasl'],
    'Project': ['CONTRIBUTING', 'CHANGELOG'],
}

project = html_title = 'mmasl'
version = release = mmasl.__version__
root_doc = 'README'
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']
include_patterns = ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'configs/**.md', 'docs/**']
exclude_patterns = ['.*', '*.egg-info', 'build', 'data', 'mmasl', 'site', 'tests', 'tools', 'work_dirs']
myst_heading_anchors = 3
highlight_language = 'text'
maximum_signature_line_length = 100
autodoc_default_options = {'members': True, 'show-inheritance': True, 'special-members': '__call__'}
autodoc_inherit_docstrings = False
napoleon_use_ivar = True
autodoc_typehints_format = 'short'
# Links to other projects would need a download of their inventories.
nitpicky = True
OTHERS = ('argparse', 'collections', 'inspect', 'json', 'matplotlib', 'mmcv', 'mmdet', 'mmengine', 'mmpretrain',
          'numpy', 'os', 'pathlib', 'subprocess', 'torch')
nitpick_ignore_regex = [('py:.*', rf'({"|".join(OTHERS)})\..*'), ('py:.*', r'(.*\.)?_\w+')]
html_theme = 'furo'
html_static_path = ['_static']
html_css_files = ['wide.css']
html_copy_source = False
html_show_sphinx = False


def walk() -> dict[str, object]:
    """All modules of mmasl by name."""
    names = ['mmasl', *(module.name for module in pkgutil.walk_packages(mmasl.__path__, 'mmasl.'))]
    return {name: importlib.import_module(name) for name in names}


def api_page(name: str, modules: dict[str, object]) -> str:
    """Page of a module with its members. The page of a package has its exports and links to its modules."""
    module = modules[name]
    lines = [name, '=' * len(name), '', f'.. automodule:: {name}', '']
    if not hasattr(module, '__path__'):
        return '\n'.join(lines)
    lines[4:4] = ['   :no-members:']
    lines += [f'- :py:obj:`{name}.{exported}`' for exported in getattr(module, '__all__', ())] + ['']
    if name == 'mmasl':
        lines += ['Names for configs', '-----------------', '']
        for kind, names in config_names().items():
            lines += [f'{kind.capitalize()}: ' + ', '.join(f':py:obj:`mmasl.{key}`' for key in names) + '.', '']
    listed = str(NAVIGATION)
    lines += ['.. toctree::', '   :caption: Modules', '   :maxdepth: 1', '']
    lines += [f'   {child}' for child in modules
              if child.rpartition('.')[0] == name and f'docs/api/{child}>' not in listed]
    return '\n'.join(lines) + '\n'


def registries() -> list:
    found = [value for value in vars(registry).values()
             if isinstance(value, registry.Registry) and value.scope == 'mmasl']
    for each in found:
        each.import_from_location()
    return found


def config_names() -> dict[str, list[str]]:
    """Names for ``type='mmasl.NAME'`` in a config, by registry."""
    return {each.name: sorted(name for name, value in each.module_dict.items() if value.__module__.startswith('mmasl.'))
            for each in registries()}


def write_api(app) -> None:
    modules = walk()
    pages = {API / f'{name}.rst': api_page(name, modules) for name in modules}
    API.mkdir(exist_ok=True)
    for old in set(API.iterdir()) - set(pages):
        old.unlink()
    for path, text in pages.items():
        if not path.exists() or path.read_text() != text:  # Sphinx reads only files that changed
            path.write_text(text)


def add_navigation(app, docname: str, content: list[str]) -> None:
    """Turn links to code into links to its page, and add the navigation to README and configs/README."""
    def page(link: re.Match) -> str:
        module = link[1].removesuffix('.py').removesuffix('/__init__').replace('/', '.')
        return f']({osp.relpath(API / module, ROOT / osp.dirname(docname))}.rst)'

    content[0] = re.sub(r'\]\((?:\.\./)?(mmasl/[\w/]+(?:\.py)?)\)', page, content[0])
    if docname == root_doc:
        for caption, pages in NAVIGATION.items():
            content[0] += '\n'.join(['', '', '```{toctree}', ':hidden:', f':caption: {caption}', '', *pages, '```'])
    if docname == 'configs/README':
        content[0] += '\n\n```{toctree}\n:hidden:\n:glob:\n\n*/README\n```'


def resolve(app, env, node, contnode):
    """Resolve names that a package exports, a config uses or a module imports.

    A constant leads to its module, an attribute to its class.
    """
    if node['reftype'] not in ('attr', 'class', 'data', 'func', 'obj'):
        return None
    target = node['reftarget'].rpartition('.')[0] if node['reftype'] == 'attr' else node['reftarget']
    for name in (target, f'{node.get("py:module")}.{target}'):
        entry = find_entry(name)
        if entry:
            return env.domains['py'].resolve_xref(env, node['refdoc'], app.builder, 'obj', entry, node, contnode)
    return None


def find_entry(name: str) -> str | None:
    """Name under which the reference describes an object of mmasl, or None."""
    module, _, member = name.rpartition('.')
    value = getattr(sys.modules.get(module), member, None)
    if value is None and module == 'mmasl':
        value = next((each.module_dict[member] for each in registries() if member in each.module_dict), None)
    if value is None or inspect.ismodule(value) or not module.startswith('mmasl'):
        return None
    return f'{value.__module__}.{value.__qualname__}' if hasattr(value, '__qualname__') else module


def prepare(app, what: str, name: str, obj: object, options, lines: list[str]) -> None:
    """Mark indented paragraphs (formulas) as literal, and keep Napoleon from reading a type before a colon in Returns.

    Types are in annotations only.
    """
    source, lines[:] = list(lines), []
    returned, last = what == 'property', ' '
    for line in source:
        if re.fullmatch(r'[A-Z]\w+:', line):
            returned = line in ('Returns:', 'Yields:')
        elif not returned and line.startswith('    ') and lines and not lines[-1] and not last.startswith(' '):
            lines += ['::', '']
        lines.append(re.sub(r':(?= |$)', '\0', line) if returned and line not in ('Returns:', 'Yields:') else line)
        last = line or last


def escape(app, what: str, name: str, obj: object, options, lines: list[str]) -> None:
    """Escape |z|, an absolute value, which reST reads as a substitution."""
    lines[:] = [re.sub(r'\|([\w/]+)\|', r'\|\1\|', line.replace('\0', ':')) for line in lines]


def plain_defaults(app, what: str, name: str, obj: object, options, arguments: str | None, result: str | None):
    """Print `...` for the default factory of a dataclass."""
    return arguments and arguments.replace('<factory>', '...'), result


def write_index(app, error: Exception | None) -> None:
    if error is None and app.builder.name == 'html':
        shutil.copy(Path(app.outdir, 'README.html'), Path(app.outdir, 'index.html'))


def setup(app) -> None:
    # MMCV's descriptor raises if the method is looked up on the class.
    cache_randomness.__get__ = lambda self, instance, owner=None: self.func
    app.connect('builder-inited', write_api)
    app.connect('source-read', add_navigation)
    app.connect('missing-reference', resolve)
    app.connect('autodoc-process-docstring', prepare, priority=400)  # napoleon's is 500
    app.connect('autodoc-process-docstring', escape, priority=600)
    app.connect('autodoc-process-signature', plain_defaults)
    app.connect('build-finished', write_index)
