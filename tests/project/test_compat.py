"""orpo/compat.py: transformers' older names under the newer ones."""

import pytest

from orpo.compat import _WithNewerNames


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing")
@pytest.mark.parametrize("on", [True, False])
def test_one_name_sets_the_other(on, tmp_path):
    newer = _WithNewerNames(output_dir=str(tmp_path), use_cpu=True, activation_checkpointing=on)
    older = _WithNewerNames(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=on)
    for args in (newer, older):
        assert args.activation_checkpointing is args.gradient_checkpointing is on


def test_what_it_is_called_with(tmp_path):
    options = {"use_reentrant": False}
    args = _WithNewerNames(output_dir=str(tmp_path), use_cpu=True, activation_checkpointing_kwargs=options)
    assert args.gradient_checkpointing_kwargs == args.activation_checkpointing_kwargs == options
