"""A URL that cannot be one of checkpoints is refused at once, with what is wrong with it."""

from __future__ import annotations

import pathlib

import pytest

from resilient.checkpoint.storage import Storage
from resilient.cli import main
from resilient.errors import TierUnavailable


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("nosuch://x", "Protocol not known: nosuch"),
        ("github://x", "missing 2 required positional arguments"),
        ("dir://x", "NoneType"),
        ("zip://x::{}", "Is a directory"),
        ("{}/file", "a directory expected, a file found"),
        ("file://{}/file/below/it", "a directory expected, a file found"),
    ],
)
def test_what_no_checkpoint_can_lie_under(tmp_path: pathlib.Path, url: str, why: str) -> None:
    """Training under a file went on to its end without a checkpoint; a driver that wants other words was a traceback."""
    (tmp_path / "file").write_text("something else")
    with pytest.raises(TierUnavailable, match=why) as caught:
        Storage(url.format(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["with space", "100%", "%20", "ünï", "a[1]*?", "new/and/below", "trail//"])
def test_any_name_is_that_of_a_directory(tmp_path: pathlib.Path, name: str) -> None:
    storage = Storage(f"{tmp_path}/{name}")
    storage.write("step-00000001/file", b"there")
    assert (tmp_path / name / "step-00000001" / "file").read_bytes() == b"there"
    assert storage.names() == ("step-00000001",)
    storage.remove_tree("step-00000001")
    assert storage.names() == ()


def test_a_file_is_not_a_place_without_checkpoints(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("something else")
    assert main(["ckpt", "ls", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == (
        f"resilient: checkpoint URL '{tmp_path}/file': a directory expected, a file found ({tmp_path}/file)\n"
    )
