"""Noto's things: their table, their drawings from npm's registry, and a package in the cache."""

import base64
import hashlib
import io
import tarfile

import numpy as np
import pytest

from training import npm
from training.noto import NOTO, rendering, things
from training.npm import Package, PackageUnavailable

CLDR = Package(
    "cldr-annotations-full",
    "48.2.0",
    "sha512-DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ==",
)


@pytest.fixture
def registry(monkeypatch):
    """A registry that gives one archive, and counts how often."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        entry = tarfile.TarInfo("package/data.txt")
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"text"))
    asked = []
    monkeypatch.setattr(npm.Package, "_by_npm", lambda _: asked.append(1) or content.getvalue())
    monkeypatch.setattr(npm.shutil, "which", lambda _: "npm")
    digest = base64.b64encode(hashlib.sha512(content.getvalue()).digest()).decode()
    return Package("@some/data", "1.0.0", f"sha512-{digest}"), asked


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SANA_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_a_package_is_fetched_once(registry, empty_cache):
    package, asked = registry
    assert package.read("data.txt") == [b"text"] == package.read("data.txt")
    assert len(asked) == 1
    assert [path.name for path in (empty_cache / "npm").iterdir()] == ["some-data-1.0.0.tgz"]


def test_a_damaged_package_is_fetched_again(registry, empty_cache):
    package, asked = registry
    package.archive().write_bytes(b"half of it")
    assert package.read("data.txt") == [b"text"]
    assert len(asked) == 2


def test_another_content_than_expected_is_refused(registry, empty_cache):
    other = Package("@some/data", "1.0.0", "sha512-another")
    with pytest.raises(PackageUnavailable, match="is not the expected package"):
        other.read("data.txt")
    assert not list((empty_cache / "npm").iterdir())


def test_without_a_registry_it_says_where_to_put_the_archive(monkeypatch, empty_cache):
    monkeypatch.setattr(npm.shutil, "which", lambda _: None)
    monkeypatch.delenv("NPM_CONFIG_REGISTRY", raising=False)
    with pytest.raises(PackageUnavailable, match=r"put its archive at .*noto-1\.2\.9\.tgz"):
        NOTO.archive()


def test_there_are_many_things_and_no_two_share_a_name():
    assert len(things()) >= 200
    for names in (
        [one.name for one in things()],
        [one.emoji for one in things()],
        [name for one in things() for name in one.chinese],
        [single for one in things() for single, _ in one.english],
    ):
        assert len(set(names)) == len(names), {name for name in names if names.count(name) > 1}
    assert {one.place for one in things()} == {"ground", "sky", "sea", "any"}
    assert all(one.measure and one.edge for one in things())


@pytest.fixture(scope="module")
def drawings():
    pytest.importorskip("resvg_py", reason='what draws them: pip install -e ".[train]"')
    try:
        return {one.name: rendering(one, 48) for one in things()}
    except PackageUnavailable as error:
        pytest.skip(str(error))


def test_every_thing_has_a_drawing_of_its_own(drawings):
    found = np.stack(list(drawings.values())).astype(float)
    assert found.shape == (len(things()), 48, 48, 4)
    cover = (found[..., 3] > 128).mean((1, 2))
    assert cover.min() > 0.1 and cover.max() < 0.95
    flat = (found[..., :3] * found[..., 3:] / 255).reshape(len(found), -1)
    apart = [np.abs(flat[i + 1 :] - flat[i]).mean(1).min() for i in range(len(flat) - 1)]
    assert min(apart) > 5


@pytest.mark.exhaustive
def test_names_are_those_of_unicode():
    """Of most things the usual name or a keyword of the Unicode consortium is one of ours."""
    import json

    try:
        paths = [f"annotations/{language}/annotations.json" for language in ("en", "zh")]
        english, chinese = (json.loads(text) for text in CLDR.read(*paths))
    except PackageUnavailable as error:
        pytest.skip(str(error))
    for table, names, share in (
        (english, lambda one: [name.split()[-1] for pair in one.english for name in pair], 0.85),
        (chinese, lambda one: one.chinese, 0.95),
    ):
        known = table["annotations"]["annotations"]
        found = 0
        for one in things():
            words = known[one.emoji.replace("\ufe0f", "")]
            words = {w.lower() for w in (*words["default"], *words["tts"])}
            found += any(name.lower() in " ".join(words) for name in names(one))
        assert found >= share * len(things())
