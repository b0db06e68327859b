from pathlib import Path

from setuptools import find_packages, setup

DETECTION = ['onedl-mmcv>=2.3.6', 'onedl-mmdetection>=3.5.1']
CLASSIFICATION = ['onedl-mmcv>=2.3.6', 'onedl-mmpretrain>=1.3.6', 'timm>=1.0', 'tqdm']
EXPORT = ['onnx>=1.18', 'onnxruntime>=1.20', 'onnxscript>=0.5']
LINT = ['ruff>=0.17', 'mypy>=2.4']
DOCS = ['sphinx>=8.1', 'myst-parser>=4', 'furo>=2024.8.6']
DEMO = ['scikit-learn>=1.3', 'scipy', 'matplotlib>=3.7']

about = {}
for line in Path(__file__).with_name('mmasl').joinpath('__init__.py').read_text().splitlines():
    if line.startswith('__version__'):
        exec(line, about)

setup(
    name='mmasl',
    version=about['__version__'],
    description='Training with the Asymmetric Loss in MMDetection and MMPretrain',
    long_description=Path(__file__).with_name('README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmasl', 'mmasl.*']),
    package_data={'mmasl.reproduce': ['tables.json']},
    python_requires='>=3.10',
    # mmengine itself is not named: upstream's and the fork's distributions differ in name, and not in the import's.
    install_requires=['torch>=2.4', 'numpy'],
    extras_require={
        'det': ['onedl-mmengine>=0.10.12', *DETECTION],
        'cls': ['onedl-mmengine>=0.10.12', *CLASSIFICATION],
        'demo': DEMO,
        'export': EXPORT,
        'docs': DOCS,
        'lint': LINT,
        'test': ['pytest>=8', 'pytest-xdist', 'hypothesis>=6', 'mpmath', 'torchmetrics>=1.4', 'torchvision',
                 *DEMO, *DOCS, *EXPORT, *LINT],
    },
)
