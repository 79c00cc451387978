import pytest
import torch

from blindlib.files import save_whole, whole


def test_a_file_is_replaced_once_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_two_who_write_the_same_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with whole(path) as one, whole(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "state.pt"
    save_whole({"x": torch.ones(2)}, path)
    with pytest.raises(Exception, match="pickle"):
        save_whole({"x": lambda: 0}, path)
    assert torch.load(path)["x"].sum() == 2 and list(tmp_path.iterdir()) == [path]
