"""The live model's loss of every candidate, one text after the other."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional

from oracle.errors import InputError, NotFiniteError
from oracle.memory import SmallerBatchWarning
from surrogate.training.strategies import loss
from surrogate.training.strategies.loss import Loss


def slow_losses(lm, texts):
    losses = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor(lm.tokenizer(text)["input_ids"][: lm.max_tokens])
            logits = lm.module(input_ids=ids[None]).logits[0].double()
            each = [functional.cross_entropy(logits[place], ids[place + 1]).item() for place in range(len(ids) - 1)]
            losses.append(sum(each) / len(each))
    return np.array(losses)


def test_scores_are_the_losses_of_one_text_after_the_other(make_context, lm, monkeypatch):
    monkeypatch.setattr(loss, "BLOCK_TEXTS", 4)
    context = make_context(candidates=np.array([0, 1, 2, 4, 5, 6, 8, 9, 10, 11]))
    ranking = Loss().rank(context)
    expected = slow_losses(lm, context.candidate_texts()["text"])
    np.testing.assert_allclose(np.asarray(ranking.scores)[:, 0], expected, rtol=1e-5)
    assert ranking.facts["mean_loss"] == pytest.approx(expected.mean(), rel=1e-5)


def test_lowest_is_highest_turned_round_and_middle_is_near_the_median(make_context):
    scores = {keep: np.asarray(Loss(keep=keep).rank(make_context()).scores)[:, 0] for keep in loss.KEPT}
    np.testing.assert_array_equal(scores["lowest"], -scores["highest"])
    places = np.argsort(np.argsort(scores["highest"]))  # 0 to 11: the middle lies at 5.5
    np.testing.assert_allclose(scores["middle"], -np.abs(places - 5.5) / 12, rtol=1e-6)
    assert spearmanr(scores["middle"], -np.abs(places - 5.5)).statistic == pytest.approx(1)


@pytest.mark.parametrize("keep", loss.KEPT)
def test_a_text_without_a_target_token_comes_last(make_context, keep):
    rows = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9]}, {"input_ids": [5, 9, 11]}, {"input_ids": [3, 3]}]
    scores = np.asarray(Loss(keep=keep).rank(make_context(rows)).scores)[:, 0]
    assert scores[1] < np.delete(scores, 1).min()
    alone = np.asarray(Loss(keep=keep).rank(make_context(rows, candidates=np.array([1]))).scores)
    np.testing.assert_array_equal(alone, [[0.0]])


def test_flops_are_those_of_a_forward_pass_over_the_candidates(make_context, lm):
    context = make_context(candidates=np.arange(7))
    ranking = Loss().rank(context)
    num_tokens = sum(len(lm.tokenizer(text)["input_ids"][: lm.max_tokens]) for text in context.candidate_texts()["text"])
    assert ranking.costs["score"]["flops"] == pytest.approx(num_tokens * lm.forward_flops_per_token)


def test_finished_blocks_are_read_and_those_of_other_weights_are_not(make_context, lm, monkeypatch):
    monkeypatch.setattr(loss, "BLOCK_TEXTS", 4)
    expected = Loss().rank(make_context(name="whole"))
    measure, measured = loss._measure_block, []

    def stops_at_the_third(lm, texts):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(len(texts))
        return measure(lm, texts)

    monkeypatch.setattr(loss, "_measure_block", stops_at_the_third)
    before = lm.fingerprint(optimizer=True)
    with pytest.raises(KeyboardInterrupt):
        Loss().rank(make_context())
    assert lm.fingerprint(optimizer=True) == before
    measured[:] = [0]  # one more is allowed
    again = Loss().rank(make_context())
    assert again.scores.tobytes() == expected.scores.tobytes()
    assert measured == [0, 4]
    assert again.costs["score"]["flops"] == expected.costs["score"]["flops"]
    lm.module.get_output_embeddings().weight.data.mul_(2)
    measured[:] = []
    with pytest.raises(KeyboardInterrupt):
        Loss().rank(make_context())


def test_blocks_are_cut_by_the_texts_and_not_by_their_order(make_context, monkeypatch):
    monkeypatch.setattr(loss, "BLOCK_TEXTS", 5)
    context = make_context()
    expected = Loss().rank(context).scores
    monkeypatch.setattr(loss, "_measure_block", None)  # whatever is needed is there
    turned = Loss().rank(make_context(pool=context.pool.select(range(len(context.pool))[::-1]))).scores
    assert np.asarray(turned)[::-1].tobytes() == expected.tobytes()


def test_dropout_is_off_and_the_random_state_is_put_back(make_context, lm, monkeypatch):
    lm.module.train()
    modes, measure = [], type(lm).token_losses

    def token_losses(batch):
        modes.append(lm.module.training)
        torch.rand(1)  # as dropout or a router might
        return measure(lm, batch)

    monkeypatch.setattr(lm, "token_losses", token_losses)
    before = torch.get_rng_state()
    Loss().rank(make_context())
    assert modes and not any(modes) and lm.module.training
    assert torch.equal(torch.get_rng_state(), before)


def test_little_memory_makes_smaller_batches(make_context, lm, monkeypatch):
    expected = Loss().rank(make_context(name="whole"))
    measure = type(lm).token_losses

    def token_losses(batch):
        if batch.input_ids.numel() > 90:
            raise torch.OutOfMemoryError("no memory left")
        return measure(lm, batch)

    monkeypatch.setattr(lm, "token_losses", token_losses)
    lm.batch_tokens = 512
    with pytest.warns(SmallerBatchWarning):
        found = Loss().rank(make_context())
    np.testing.assert_allclose(np.asarray(found.scores), np.asarray(expected.scores), rtol=1e-5)
    assert lm.batch_tokens == 512


def test_a_broken_model_is_refused_and_nothing_of_it_kept(make_context, lm):
    lm.module.get_output_embeddings().weight.data.fill_(torch.nan)
    context = make_context()
    with pytest.raises(NotFiniteError, match="12 texts"):
        Loss().rank(context)
    assert not list(context.folder.rglob("*.json"))


def test_an_unknown_part_is_refused():
    with pytest.raises(InputError, match="did you mean 'highest'"):
        Loss(keep="high")


SCRIPT = textwrap.dedent("""
    import sys
    from pathlib import Path
    import numpy as np, torch, transformers, oracle
    from surrogate.feature_cache import FeatureCache
    from surrogate.training.strategies import RankingContext, loss

    folder, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if world_size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                      intermediate_size=32, max_position_embeddings=64)
    lm = oracle.LanguageModel(transformers.LlamaForCausalLM(config), max_tokens=64, device="cpu")
    rows = [{"input_ids": torch.randint(3, 99, (8 + i,), generator=torch.Generator().manual_seed(i)).tolist()} for i in range(21)]
    loss.BLOCK_TEXTS = 4
    measure, measured = loss._measure_block, []
    loss._measure_block = lambda lm, texts: measured.append(len(texts)) or measure(lm, texts)
    pool, own = oracle.read_texts(rows), folder / f"of_{world_size}"
    context = RankingContext(pool=pool, candidates=np.arange(21), targets=[], lm=lm, cache=FeatureCache(own), folder=own)
    np.savez(own.with_name(f"scores_{world_size}_{rank}.npz"), scores=loss.Loss().rank(context).scores, measured=measured)
""")


@pytest.mark.slow
def test_several_processes_share_the_blocks_and_find_the_same_bytes(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    for world_size in (1, 2):
        started = [
            subprocess.Popen([sys.executable, tmp_path / "script.py", tmp_path, str(rank), str(world_size)])
            for rank in range(world_size)
        ]
        assert [process.wait(timeout=120) for process in started] == [0] * world_size
    alone, first, second = (np.load(tmp_path / f"scores_{name}.npz") for name in ("1_0", "2_0", "2_1"))
    assert alone["measured"].tolist() == [4, 4, 4, 4, 4, 1]
    assert first["measured"].tolist() == [4, 4, 4] and second["measured"].tolist() == [4, 4, 1]
    for shared in (first, second):
        assert shared["scores"].tobytes() == alone["scores"].tobytes()
