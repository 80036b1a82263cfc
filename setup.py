"""Installs phi4rv, with the CUDA kernels of csrc/ where nvcc is found, else as pure Python."""

import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from csrc import build


class BuildWithKernels(build_py):
    """Builds the library first, so that it is packed with the modules."""

    def run(self) -> None:
        print(build.build() or f"built {build.LIBRARY.name}")
        super().run()


class Wheel(bdist_wheel):
    """With the library a wheel is for one platform, yet for every Python: the library knows nothing of it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = build.nvcc() is None

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    name="phi4rv",
    version="0.1.0",
    description="Train and run Phi-4-reasoning-vision-15B on packed sequences",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["phi4rv*", "triton_kernels*", "train*", "infer*"]),
    package_data={
        "train.synthetic": ["*.jinja"],
        "infer.server": ["page.html"],
        "triton_kernels": ["tuned.json"],
        "phi4rv": [f"lib/{build.LIBRARY.name}"],
    },
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": Wheel},
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
        "tensorboard": ["tensorboard"],
        "serve": ["aiohttp>=3.14", "prometheus-client>=0.20"],
        "constrained": ["llguidance>=1.0"],
        "dev": ["pytest", "pytest-xdist", "transformers>=5", "ruff", "mypy"],
        "build": ["ninja"],
    },
)
