"""What `pip install .` puts on a machine: the package, whole, and nothing beside it."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tracked(*folders: str) -> set[str]:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *folders]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout
    return {name for name in names.decode().split("\0") if name and (ROOT / name).is_file()}


def test_the_wheel_is_the_tree(tmp_path):
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(tmp_path / "src"),
    ]
    for name in tracked("."):  # a copy, so that building leaves nothing in the checkout
        target = tmp_path / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = {Path(name).name for name in archive.namelist() if "/licenses/" in name}
    expected = tracked("sana_cli") | {f"sana_cli/{name}" for name in tracked("kernels")}
    assert licences == {"LICENSE", "NOTICE"}
    assert files == expected | {"sana_cli/data/weights.toml"}
    assert sum(path.stat().st_size for path in (ROOT / "sana_cli/demo").rglob("*")) < 25e6
