"""The runner as one file: the same bytes from the same sources, and it runs alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgecnn.devices.zipapp import PACKAGE, build_zipapp, zipapp_bytes


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zipapp") / "runner.pyz"
    build_zipapp(path)
    return path


def test_the_sha256_is_the_files_and_does_not_change(tmp_path: Path, runner: Path) -> None:
    digest = build_zipapp(tmp_path / "a.pyz")
    assert digest == hashlib.sha256((tmp_path / "a.pyz").read_bytes()).hexdigest()
    assert (tmp_path / "a.pyz").read_bytes() == runner.read_bytes() == zipapp_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pyz"]


def test_it_holds_the_runners_modules_and_nothing_else(runner: Path) -> None:
    folder = Path(__file__).parent.parent / "edgecnn" / "runner"
    with zipfile.ZipFile(runner) as archive:
        names = archive.namelist()
    assert names == [
        "__main__.py",
        *(f"{PACKAGE}/{name}" for name in sorted(p.name for p in folder.glob("*.py"))),
    ]
    assert len(runner.read_bytes()) < 100_000


def test_it_probes_from_another_folder_without_this_project(tmp_path: Path, runner: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps({"task": "probe", "runtimes": ["onnxruntime"]}))
    command = [sys.executable, "-I", str(runner), "request.json", "result.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ok"] is True
    assert list(result["runtimes"]) == ["onnxruntime"]


def test_an_old_python_is_told_so(runner: Path) -> None:
    code = (
        "import sys, runpy; sys.version_info = (3, 8, 1); "
        f"sys.argv = [{str(runner)!r}]; runpy.run_path({str(runner)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == "edgecnn's runner needs Python 3.9 or newer, this is 3.8\n"


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        build_zipapp(tmp_path / "none" / "runner.pyz")
