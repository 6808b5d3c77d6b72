"""Weights in a folder are known by what they are, not by where or when."""

import shutil

import pytest

from sana_cli.weights.fingerprint import READ_WHOLE, fingerprint


@pytest.fixture(params=["small", "large"])
def weights(request, tmp_path):
    size = {"small": 5000, "large": READ_WHOLE + 12_345}[request.param]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(size))
    return path


def test_a_copy_has_the_same_fingerprint(weights, tmp_path):
    copied = shutil.copy(weights, tmp_path / "copied")  # with another time
    assert fingerprint([("vae", weights)]) == fingerprint([("vae", copied)])


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_what_training_changes_shows(weights, place):
    before, size = fingerprint([("vae", weights)]), weights.stat().st_size
    changed = bytearray(weights.read_bytes())
    start = int(place * (size - size // 50))
    changed[start : start + size // 50] = b"\1" * (size // 50)
    weights.write_bytes(changed)
    assert fingerprint([("vae", weights)]) != before


def test_the_size_and_the_use_of_a_file_count(weights):
    found = {fingerprint([("vae", weights)]), fingerprint([("transformer", weights)])}
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert len(found | {fingerprint([("vae", weights)])}) == 3
