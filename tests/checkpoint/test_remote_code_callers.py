"""The modelling files against what calls them: names of the cache, unknown arguments, versions of transformers."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers.exported import Exported, tokens

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "versions"))
import check  # noqa: E402
import run  # noqa: E402

pytestmark = pytest.mark.usefixtures("transformers_state")


@pytest.fixture
def model(tmp_path: Path):
    return Exported(tmp_path / "model", bias=-0.8).load()


def test_the_checks_of_the_version_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests/versions/run.py asks of every version of transformers, of the one that is installed."""
    monkeypatch.setattr(builtins, "input", check.no_question)
    subject = check.Subject(run.make_directory(tmp_path))
    for function in check.CHECKS.values():
        function(subject)


def test_both_names_of_the_cache(model) -> None:
    """transformers 5.24 says ``cache``, versions before it ``past_key_values``."""
    ids, token = torch.tensor([tokens(20)]), torch.tensor([[5]])
    wanted = model(torch.cat((ids, token), dim=1)).logits[:, -1:]
    for name in ("past_key_values", "cache"):
        cache = model(ids, use_cache=True).past_key_values
        logits = model(token, **{name: cache}).logits
        assert (logits - wanted).abs().max() <= 1e-4
        assert model.generate(torch.cat((ids, token), dim=1), max_new_tokens=4, **{name: cache}).shape == (1, 25)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(token, cache=cache, past_key_values=model(ids, use_cache=True).past_key_values)
    with pytest.raises(ValueError, match="is a DynamicCache; give the DMCCache"):
        model(token, cache=transformers.DynamicCache())


def test_unknown_arguments_are_refused(model) -> None:
    ids = torch.tensor([tokens(20)])
    wanted = model(ids).logits
    inert = dict(
        cache_position=torch.arange(20), token_type_ids=torch.zeros_like(ids), head_mask=None, output_attentions=False
    )
    assert torch.equal(model(ids, **inert).logits, wanted)
    for named in (
        dict(block_table=torch.zeros(1, 1)),
        dict(cu_seq_lens_q=torch.tensor([0, 20])),
        dict(token_type_ids=torch.ones_like(ids)),
        dict(past_buckets_states=()),
    ):
        with pytest.raises(ValueError, match=next(iter(named))):
            model(ids, **named)
        with pytest.raises(ValueError, match=next(iter(named))):
            model.model(ids, **named)


def test_a_cache_that_does_not_grow_is_noticed(model) -> None:
    """A caller that counts positions on and hands the cache over under an unknown name, or hands over an old one."""
    ids, position = torch.tensor([tokens(20)]), torch.tensor([[20]])
    with pytest.raises(ValueError, match="position 20, and the cache ends before 0: it has not grown"):
        model(torch.tensor([[5]]), position_ids=position, use_cache=True)
    cache = model(ids, use_cache=True, position_ids=torch.arange(20)[None]).past_key_values
    model(torch.tensor([[5]]), position_ids=position, past_key_values=cache)
    with pytest.raises(ValueError, match="position 22, and the cache ends before 21"):
        model(torch.tensor([[5]]), position_ids=position + 2, past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(torch.tensor([[5]]), attention_mask=torch.ones(1, 21), use_cache=True)


def test_positions_go_on_from_where_they_were(model) -> None:
    """Positions that do not begin at 0 are gone on with, with and without position_ids."""
    ids = torch.tensor([tokens(20)])
    wanted = model(ids).logits[:, 12:]
    for positions in (None, torch.arange(112, 120)[None]):
        cache = model(ids[:, :12], position_ids=torch.arange(100, 112)[None], use_cache=True).past_key_values
        named = {} if positions is None else dict(position_ids=positions)
        assert (model(ids[:, 12:], past_key_values=cache, **named).logits - wanted).abs().max() <= 1e-4


def test_continuous_batching_is_refused(model) -> None:
    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        with pytest.raises(ValueError, match="continuous batching .* `dmc serve`"):
            getattr(model, name)([tokens(5)])


@pytest.mark.parametrize("version", ["4.49.0", "3.5.1"])
def test_an_older_transformers_is_refused(version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = Exported(tmp_path / "model", bias=-0.8)
    monkeypatch.setattr("transformers.__version__", version)  # of the module that is imported next
    with pytest.raises(ImportError, match=f"transformers {version} is not known to modeling_dmc.py; use 4.50 to"):
        exported.load()
