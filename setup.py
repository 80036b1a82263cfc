"""Installs phi4rv: pure Python, no compiled part yet."""

from setuptools import setup

setup(
    name="phi4rv",
    version="0.1.0",
    description="Train and run Phi-4-reasoning-vision-15B on packed sequences",
    license="MIT",
    python_requires=">=3.11",
    packages=["triton_kernels", "phi4rv", "train", "train.synthetic", "infer"],
    package_data={"train": ["*.jinja"], "triton_kernels": ["tuned.json"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy>=2",
        "pillow>=11",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "jinja2>=3.1",
        "tqdm>=4.66",
    ],
    extras_require={
        "triton": ["triton>=3.6"],
        "dev": ["pytest", "pytest-xdist", "ninja", "transformers>=5", "ruff", "mypy"],
    },
)
