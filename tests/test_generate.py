"""What someone at a shell sees of `sana generate`."""

from PIL import Image

FAST = ("--steps", "1", "--no-instruction")


def test_prints_the_path_and_writes_the_picture(sana, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = sana("generate", "A red Fox!", "-m", str(tiny_model), "-s", "7", *FAST)
    assert (run.code, run.out) == (0, "a-red-fox-7.png\n")
    with Image.open("a-red-fox-7.png") as picture:
        assert picture.size == (512, 512)
    assert "seed 7" in run.err
    assert list(tmp_path.iterdir()) == [tmp_path / "a-red-fox-7.png"]
