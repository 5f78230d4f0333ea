from setuptools import setup

reports = ['faster-coco-eval', 'jinja2', 'tensorboard']
export = ['onnx', 'onnxscript', 'onnxruntime']

setup(
    name='spec_mmdet',
    version='0.1.0',
    description='Spectrally conditioned XCiT for object detection and instance segmentation on MMDetection',
    license='Apache-2.0',
    packages=['spec_mmdet'],
    package_data={'spec_mmdet': ['report.html']},
    python_requires='>=3.10',
    # Neither mmdet nor mmcv: each has several distributions of one import name (mmcv, mmcv-lite, onedl-mmcv), and pip
    # would overwrite the one that is there. The extras install a set that is known to work together.
    install_requires=['torch>=2.6', 'torchvision', 'numpy', 'scipy', 'safetensors'],
    extras_require={
        # mmengine 0.10.7 imports pkg_resources, which setuptools 82 dropped.
        'mmdet': ['mmdet==3.3.0', 'mmengine==0.10.7', 'mmcv-lite==2.1.0', 'setuptools<82', *reports],
        'onedl': ['onedl-mmdetection==3.5.1', 'onedl-mmengine==0.10.12', 'onedl-mmcv==2.3.6', *reports],
        'export': export,
        'test': ['pytest', 'hypothesis', 'timm', 'transformers', 'ruff', *export],
        # Of its models' layouts; the one for mmdet 3.3.0 has not kept up with transformers.
        'test-onedl': ['onedl-mmpretrain==1.3.6', 'transformers<5'],
    },
)
