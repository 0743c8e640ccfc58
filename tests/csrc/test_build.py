"""What setup.py does where native kernels cannot be built."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "csrc", "flatkern")
IGNORED = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")


def build_wheel(tmp_path, **environment):
    """Run the build as pip's backend does, on a copy of the sources."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=IGNORED)
        else:
            shutil.copy(source, tmp_path / name)
    result = subprocess.run(
        [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", "dist"],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    [wheel] = (tmp_path / "dist").glob("*.whl")
    return wheel, result.stderr


def test_no_compiler_installs_pure_python_and_says_so_once(tmp_path):
    wheel, stderr = build_wheel(tmp_path, CXX="no-such-compiler")
    assert stderr.count("no C++ compiler was found") == 1
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "flatkern/reference/noise.py" in names
    assert "flatkern/demo/requirements.txt" in names
    assert not [name for name in names if name.endswith(".so")]
