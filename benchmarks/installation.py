"""Download, size and time of an installation, with and without the extra `train`.

Usage: python benchmarks/installation.py

Installs the requirements of `pyproject.toml` in fresh environments, without the cache of pip, and prints a Markdown
table. The versions are those of `constraints.txt`. Whether torch comes with the libraries of CUDA depends on the
package index.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def measured(requirements: list[str], folder: Path) -> tuple[int, int, float]:
    """Install requirements in a fresh environment.

    Args:
        requirements: The requirements, as pip reads them.
        folder: An empty folder.

    Returns:
        Bytes of the downloaded packages, bytes on the disk without pip itself, and seconds of `pip install`.
    """
    venv.create(folder / "environment", with_pip=True)
    packages = next((folder / "environment").rglob("site-packages"))
    before = size(packages)
    pip: list[Any] = [folder / "environment" / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options: list[Any] = ["--no-cache-dir", "-c", ROOT / "constraints.txt", *requirements]
    subprocess.run([*pip, "download", "-d", folder / "downloads", *options], check=True)
    start = time.perf_counter()
    subprocess.run([*pip, "install", *options], check=True)
    seconds = time.perf_counter() - start
    return size(folder / "downloads"), size(packages) - before, seconds


def size(folder: Path) -> int:
    """The bytes that the files of a folder take on the disk, in which unwritten blocks do not count."""
    return sum(512 * path.lstat().st_blocks for path in folder.rglob("*"))


def main() -> None:
    """Measure both installations and print the table."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    light = project["dependencies"]
    rows = {
        "the dependencies": light,
        "also those of `train`": [*light, *project["optional-dependencies"]["train"]],
    }
    print("| packages | download | installed | time |\n|---|---|---|---|")
    for name, requirements in rows.items():
        with tempfile.TemporaryDirectory() as folder:
            downloaded, installed, seconds = measured(requirements, Path(folder))
        print(f"| {name} | {downloaded / 1e6:,.0f} MB | {installed / 1e6:,.0f} MB | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
