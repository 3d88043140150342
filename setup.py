"""models/, bench/ and tests/parity stand at the top of the tree and import as parts of m3kernels."""

from setuptools import find_packages, setup

MAPPED = {"m3kernels.models": "models", "m3kernels.bench": "bench", "m3kernels.parity": "tests/parity"}


def packages() -> list[str]:
    found = ["m3kernels"] + [f"m3kernels.{name}" for name in find_packages("m3kernels")]
    for name, folder in MAPPED.items():
        found += [name] + [f"{name}.{sub}" for sub in find_packages(folder)]
    return found


setup(
    packages=packages(),
    package_dir=MAPPED,
    package_data={"m3kernels.ops": ["*.json"], "m3kernels.bench": ["results/**/*.jsonl"]},
)
