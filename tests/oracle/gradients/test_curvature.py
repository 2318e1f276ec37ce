"""Kronecker factors against explicit matrices in float64, and what their fit promises."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from oracle.errors import InputError, MismatchError, MissingFileError, NotFiniteError
from oracle.gradients import curvature
from oracle.gradients.curvature import KroneckerFactors, fit_factors
from oracle.gradients.linear_layers import Layer
from oracle.language_model import LanguageModel


@pytest.fixture
def lm(make_module):
    return LanguageModel(make_module("llama"), max_tokens=64)


def _summed_loss(lm, text):
    ids = torch.tensor([text.input_ids])
    return lm.module(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)


def _uses(lm, layer, text):
    """Inputs (L-1, I) and output gradients (L-1, O) of each use of a layer, in float64."""
    uses = []
    modules = [lm.module.get_submodule(name) for name in layer.modules]
    handles = [module.register_forward_hook(lambda module, args, output: uses.append((args[0], output))) for module in modules]
    loss = _summed_loss(lm, text)
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(loss, [output for _, output in uses])
    rows = [(x[0, :-1].detach().double(), b[0, :-1].double()) for (x, _), b in zip(uses, gradients, strict=True)]
    return [(torch.cat([a, torch.ones(len(a), 1).double()], 1) if layer.bias else a, b) for a, b in rows]


def _plain_direction(lm, layer, texts, gradient, *, damping, max_dim=10**6):
    """Precondition a gradient (O, I) by the text: explicit sums, one token and one text after the other."""
    inputs, outputs = torch.zeros(layer.num_inputs, layer.num_inputs), torch.zeros(layer.num_outputs, layer.num_outputs)
    inputs, outputs, whole = inputs.double(), outputs.double(), []
    for text in texts:
        total = torch.zeros(layer.num_outputs, layer.num_inputs).double()
        for rows in _uses(lm, layer, text):
            for a, b in zip(*rows, strict=True):
                inputs += torch.outer(a, a)
                outputs += torch.outer(b, b)
                total += torch.outer(b, a)
        whole.append(total)
    u_a, u_s = (
        torch.eye(len(matrix)).double() if len(matrix) > max_dim else torch.linalg.eigh(matrix)[1] for matrix in (inputs, outputs)
    )
    eigenvalues = torch.stack([(u_s.T @ total @ u_a).square() for total in whole]).mean(0)
    return u_s @ ((u_s.T @ gradient.double() @ u_a) / (eigenvalues + damping)) @ u_a.T, eigenvalues.mean()


def _gradients(lm, text):
    names = [name for name, _ in lm.module.named_parameters()]
    gradients = torch.autograd.grad(_summed_loss(lm, text), list(lm.module.parameters()))
    return {name: gradient.unsqueeze(0).float() for name, gradient in zip(names, gradients, strict=True)}


def _encoded(lm, rows):
    return sorted(lm.encode(rows), key=lambda text: text.text_id)


def _share_a_layer(module):
    module.transformer.h[1].mlp.c_fc = module.transformer.h[0].mlp.c_fc


CASES = {
    "conv1d with biases, tied head": ("gpt2", {}, 10**6, None),
    "linear with biases": ("neox", {}, 10**6, None),
    "linear without biases": ("llama", {}, 10**6, None),
    "wide sides diagonal": ("llama", {}, 40, None),
    "one layer used twice": ("gpt2", {}, 10**6, _share_a_layer),
}


@pytest.mark.parametrize("case", CASES)
def test_preconditioned_gradients_equal_explicit_matrices_in_float64(case, make_module, make_token_texts):
    kind, options, max_dim, change = CASES[case]
    module = make_module(kind, **options)
    if change is not None:
        change(module)
    lm = LanguageModel(module, max_tokens=64)
    rows = make_token_texts(6, seed=3, longest=12)
    factors = fit_factors(lm, rows, fisher="empirical", max_factor_dim=max_dim, block_size=4)
    gradients = _gradients(lm, lm.encode(make_token_texts(1, seed=8))[0])
    linear = [m for m in module.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    assert len(factors.layers) == len(linear) == len({layer.weight for layer in factors.layers})
    assert sum(bool(layer.bias) for layer in factors.layers) == sum(getattr(m, "bias", None) is not None for m in linear)
    for layer in factors.layers:
        damping = 0.1 * float(factors.curvature[layer.weight].mean())
        joined = layer.join(gradients)
        found = factors.precondition(layer, joined, damping)
        expected, mean = _plain_direction(lm, layer, _encoded(lm, rows), joined[0], damping=damping, max_dim=max_dim)
        assert float(factors.curvature[layer.weight].double().mean()) == pytest.approx(float(mean), rel=1e-4), layer.weight
        assert float((found[0] - expected).abs().max() / expected.abs().max()) < 1e-4, layer.weight
        parted = layer.part(found)
        assert {name: tuple(t.shape) for name, t in parted.items()} == {name: tuple(gradients[name].shape) for name in parted}
        torch.testing.assert_close(layer.join(parted), found)


def test_where_the_kronecker_structure_is_exact_the_inverse_is_that_of_the_whole_fisher(lm):
    """Texts of two tokens with the same first one: one position carries a gradient, its inputs are the same in all texts."""
    rows = [{"input_ids": [7, token]} for token in range(20, 60)]
    factors = fit_factors(lm, rows, fisher="empirical")
    layer = next(layer for layer in factors.layers if layer.weight.endswith("1.self_attn.v_proj.weight"))
    every = torch.stack([layer.join(_gradients(lm, text))[0] for text in _encoded(lm, rows)]).double()  # (N, O, I)
    flat = every.flatten(1)
    fisher, damping = flat.T @ flat / len(flat), 1e-3
    expected = torch.linalg.solve(fisher + damping * torch.eye(len(fisher)).double(), flat[0]).view(every[0].shape)
    found = factors.precondition(layer, every[:1].float(), damping)[0].double()
    assert float((expected - every[0] / (fisher.trace() / len(fisher) + damping)).abs().max() / expected.abs().max()) > 0.5
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def test_curvature_divides_and_does_not_multiply():
    layer = Layer("w", "", ["w"], num_outputs=2, num_inputs=2, is_transposed=False, is_tied=False)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    factors = KroneckerFactors([layer], {"w::inputs": turn, "w::outputs": turn}, {"w": torch.tensor([[100.0, 1.0], [1.0, 0.0]])})
    steep, flat = torch.outer(turn[:, 0], turn[:, 0]), torch.outer(turn[:, 1], turn[:, 1])
    found = factors.precondition(layer, torch.stack([steep, flat]), 0.5)
    torch.testing.assert_close(found[0], steep / 100.5)
    torch.testing.assert_close(found[1], flat / 0.5)


def _directions(lm, factors, rows):
    gradients = _gradients(lm, lm.encode(rows)[0])
    return {layer.weight: factors.precondition(layer, layer.join(gradients), 0.1) for layer in factors.layers}


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_padding_and_batches_do_not_change_the_factors(fisher, lm, make_token_texts, monkeypatch):
    rows, own = make_token_texts(9, seed=3), make_token_texts(1, seed=8)
    together = fit_factors(lm, rows, fisher=fisher)
    monkeypatch.setattr(LanguageModel, "default_batch_tokens", 1)  # one text per batch, so no padding
    alone = fit_factors(lm, rows, fisher=fisher, block_size=2)
    expected, found = (_directions(lm, factors, own) for factors in (together, alone))
    for name in expected:
        torch.testing.assert_close(
            alone.curvature[name].mean(),
            together.curvature[name].mean(),
            rtol=1e-4,
            atol=0,
            msg=lambda text, n=name: f"{n}: {text}",
        )
        assert float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) < 1e-3, name


def test_what_stands_after_the_last_target_does_not_count(lm, make_token_texts):
    rows = make_token_texts(6, seed=3, longest=12)
    plain = [{**row, "labels": row["input_ids"]} for row in rows]
    longer = [{"input_ids": row["input_ids"] + [9] * 5, "labels": row["input_ids"] + [-100] * 5} for row in rows]
    first, second = (fit_factors(lm, texts, fisher="empirical", block_size=6) for texts in (plain, longer))
    expected, found = (_directions(lm, factors, make_token_texts(1, seed=8)) for factors in (first, second))
    for name in expected:
        assert float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) < 1e-3, name


def test_conv1d_is_a_linear_layer(make_module, make_token_texts):
    module, rows = make_module("gpt2"), make_token_texts(6, seed=3)
    factors = fit_factors(LanguageModel(module, max_tokens=64), rows)
    for block in module.transformer.h:
        for parent, name in ((block.attn, "c_attn"), (block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            old = getattr(parent, name)
            new = nn.Linear(*old.weight.shape)
            with torch.no_grad():
                new.weight.copy_(old.weight.T)
                new.bias.copy_(old.bias)
            setattr(parent, name, new)
    same = fit_factors(LanguageModel(module, max_tokens=64), rows)
    for layer in factors.layers:
        torch.testing.assert_close(same.curvature[layer.weight].sum(), factors.curvature[layer.weight].sum(), rtol=1e-4, atol=0)


def test_the_true_fisher_is_the_mean_of_sampled_ones(lm):
    """Over many seeds the curvature of a text of two tokens tends to the exact expectation over the model's predictions."""
    from oracle.encoding import EncodedText

    layer_name = "model.layers.1.mlp.down_proj.weight"
    text = lm.encode([{"input_ids": [7, 20]}])[0]
    totals = [fit_factors(lm, [{"input_ids": [7, 20]}], seed=seed).curvature[layer_name].sum() for seed in range(30)]
    probabilities = lm.module(input_ids=torch.tensor([[7]])).logits[0, 0].softmax(-1)
    weight = lm.module.get_parameter(layer_name)
    squares = []
    for token in range(0, len(probabilities)):
        loss = _summed_loss(lm, EncodedText(text.text_id, [7, token], [7, token]))
        squares.append(torch.autograd.grad(loss, weight)[0].square().sum())
    expected = float((probabilities.detach() * torch.stack(squares)).sum())
    assert float(torch.stack(totals).mean()) == pytest.approx(expected, rel=0.2)


def test_parameters_without_factors_have_the_mean_square_of_the_entries_a_text_touches(lm, make_token_texts):
    rows = make_token_texts(5, seed=3)
    factors = fit_factors(lm, rows, fisher="empirical")
    every = [_gradients(lm, text) for text in _encoded(lm, rows)]
    others = {name for name, _ in lm.module.named_parameters()} - {layer.weight for layer in factors.layers}
    assert others == {name for name in others if "norm" in name or "embed" in name} and len(others) == 6
    for name in others:
        squares = sum(float(gradients[name].double().square().sum()) for gradients in every)
        entries = sum(int((gradients[name] != 0).sum()) for gradients in every)
        assert float(factors.curvature[name]) == pytest.approx(squares / entries, rel=1e-4)


def test_experts_that_gather_tokens_have_no_factors_and_frozen_weights_take_no_part(make_module, make_token_texts):
    module = make_module("mixtral")
    frozen = module.get_parameter("model.layers.0.self_attn.q_proj.weight")
    frozen.requires_grad_(False)
    factors = fit_factors(LanguageModel(module, max_tokens=64), make_token_texts(4, seed=3))
    names = {layer.weight for layer in factors.layers}
    assert names == {
        *(f"model.layers.{i}.self_attn.{side}_proj.weight" for i in range(2) for side in "qkvo"),
        "lm_head.weight",
    } - {"model.layers.0.self_attn.q_proj.weight"}
    assert any("experts" in name for name in set(factors.curvature) - names)
    assert "model.layers.0.self_attn.q_proj.weight" not in factors.curvature


def test_a_layer_that_sees_tokens_in_another_order_has_no_factors(make_module, make_token_texts):
    module = make_module("gpt2")
    for handle_of in (module.transformer.h[0].mlp.c_fc,):
        handle_of.register_forward_pre_hook(lambda module, args: (torch.cat([args[0], args[0]], 0),))
        handle_of.register_forward_hook(lambda module, args, output: output[: len(output) // 2])
    factors = fit_factors(LanguageModel(module, max_tokens=64), make_token_texts(4, seed=3))
    assert "transformer.h.0.mlp.c_fc.weight" not in {layer.weight for layer in factors.layers}
    assert factors.curvature["transformer.h.0.mlp.c_fc.weight"].dim() == 0


def test_same_bytes_whatever_the_order_of_the_texts_and_read_back_as_fitted(lm, make_token_texts, tmp_path, monkeypatch):
    rows = make_token_texts(7, seed=3)
    fitted = fit_factors(lm, rows, tmp_path / "one", block_size=3)
    fit_factors(lm, rows[::-1], tmp_path / "two", block_size=3)
    assert (tmp_path / "one/factors.safetensors").read_bytes() == (tmp_path / "two/factors.safetensors").read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["factors.safetensors", "meta.json"]
    monkeypatch.setattr(curvature, "FactorFit", None)  # finished factors are not fitted again
    for loaded in (fit_factors(lm, rows, tmp_path / "one", block_size=3), KroneckerFactors.load(tmp_path / "one")):
        assert loaded.layers == fitted.layers
        assert set(loaded.curvature) == set(fitted.curvature) and set(loaded.vectors) == set(fitted.vectors)
        assert all(torch.equal(loaded.curvature[name], fitted.curvature[name]) for name in fitted.curvature)
        assert all(torch.equal(loaded.vectors[name], fitted.vectors[name]) for name in fitted.vectors)
        assert loaded.meta["identity"] == fitted.meta["identity"] and loaded.meta["cost"]["fit_flops"] > 0


def test_another_checkpoint_other_texts_or_options_are_refused(lm, make_token_texts, tmp_path):
    rows = make_token_texts(4, seed=3)
    factors = fit_factors(lm, rows, tmp_path)
    factors.check_model(lm)
    with pytest.raises(MismatchError, match="fisher: stored 'sampled', asked 'empirical'"):
        fit_factors(lm, rows, tmp_path, fisher="empirical")
    with pytest.raises(MismatchError, match="texts"):
        fit_factors(lm, rows[:3], tmp_path)
    with torch.no_grad():
        next(lm.module.parameters()).add_(1e-3)
    with pytest.raises(MismatchError, match="checkpoint"):
        fit_factors(lm, rows, tmp_path)
    with pytest.raises(MismatchError, match="checkpoint"):
        factors.check_model(lm)
    with pytest.raises(MissingFileError):
        KroneckerFactors.load(tmp_path / "nowhere")


def test_unfinished_factors_of_other_options_are_refused(lm, make_token_texts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(KroneckerFactors, "save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit_factors(lm, make_token_texts(4, seed=3), tmp_path)
    with pytest.raises(MismatchError, match="seed"):
        fit_factors(lm, make_token_texts(4, seed=3), tmp_path, seed=1)


def test_a_call_that_failed_before_anything_was_summed_may_be_corrected(lm, make_token_texts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(curvature.FactorFit, "run", lambda fit: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit_factors(lm, make_token_texts(4, seed=3), tmp_path)
    assert fit_factors(lm, make_token_texts(4, seed=3), tmp_path, seed=1).meta["identity"]["seed"] == 1


def test_factors_of_a_model_with_another_config_are_refused(lm, make_token_texts, tmp_path):
    """The weights are the same, and what is computed with them is not."""
    factors = fit_factors(lm, make_token_texts(4, seed=3), tmp_path)
    lm.module.config.rms_norm_eps *= 2
    with pytest.raises(MismatchError, match="config"):
        fit_factors(lm, make_token_texts(4, seed=3), tmp_path)
    with pytest.raises(MismatchError, match="config"):
        factors.check_model(lm)


@pytest.mark.parametrize("option", [{"max_factor_dim": 2.5}, {"block_size": 0}], ids=str)
def test_counts_are_whole_numbers(option, lm, make_token_texts):
    with pytest.raises(InputError, match=next(iter(option))):
        fit_factors(lm, make_token_texts(4, seed=3), **option)


def test_the_model_is_left_as_it_was_also_when_a_text_raises(lm, make_token_texts, monkeypatch):
    lm.module.train()
    frozen = lm.module.get_parameter("model.layers.0.self_attn.q_proj.weight")
    frozen.requires_grad_(False)
    before = (lm.fingerprint(), torch.get_rng_state(), [p.requires_grad for p in lm.module.parameters()])

    def check():
        assert lm.fingerprint() == before[0] and torch.equal(torch.get_rng_state(), before[1])
        assert [p.requires_grad for p in lm.module.parameters()] == before[2] and lm.module.training
        assert all(p.grad is None for p in lm.module.parameters())
        assert not any(module._forward_hooks for module in lm.module.modules())

    with torch.no_grad():
        fit_factors(lm, make_token_texts(4, seed=3))
    check()
    monkeypatch.setattr(curvature.FactorFit, "_add_squares", lambda *args: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        fit_factors(lm, make_token_texts(4, seed=3))
    check()


def test_what_nothing_can_be_fitted_on_is_refused(lm, make_token_texts):
    rows = make_token_texts(4, seed=3)
    with pytest.raises(InputError, match="did you mean 'sampled'"):
        fit_factors(lm, rows, fisher="sample")
    with pytest.raises(InputError, match="target token"):
        fit_factors(lm, [{"input_ids": [4]}])
    for parameter in lm.module.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    with pytest.raises(InputError, match="no linear layer"):
        fit_factors(lm, rows)
    lm.module.requires_grad_(True)
    with torch.no_grad():
        lm.module.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="NaN"):
        fit_factors(lm, rows)


SCRIPT = textwrap.dedent("""
    import os, pathlib, signal, sys, time, torch, transformers, oracle
    from oracle.gradients import curvature, factor_fit
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                      intermediate_size=64, max_position_embeddings=64)
    lm = oracle.LanguageModel(transformers.LlamaForCausalLM(config), max_tokens=64)
    rows = [{"input_ids": torch.randint(3, 99, (20,), generator=torch.Generator().manual_seed(i)).tolist()} for i in range(16)]
    here, save = pathlib.Path(sys.argv[1]), factor_fit.save_tensors
    for stage in ("covariances", "eigenvectors-2", "curvature"):
        process = os.fork()
        if process == 0:
            def save_and_wait(path, tensors, **options):
                save(path, tensors, **options)
                if path.stem == stage and (not options or options["state"]["blocks"] == 3):
                    (here / stage).touch()
                    time.sleep(600)
            factor_fit.save_tensors = save_and_wait
            curvature.fit_factors(lm, rows, here / "killed", block_size=2)
            os._exit(1)
        deadline = time.monotonic() + 60
        while not (here / stage).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL and (here / stage).exists(), stage
        assert not (here / "killed/meta.json").exists()
    factor_fit.draw_labels, draw, drawn = lambda *a, **o: drawn.append(len(a[1])) or draw(*a, **o), factor_fit.draw_labels, []
    curvature.fit_factors(lm, rows, here / "killed", block_size=2)
    assert sum(drawn) == 10 + 16, drawn  # the five blocks that were left, and one by one for the parameters without factors
    curvature.fit_factors(lm, rows, here / "whole", block_size=2)
""")


def test_killed_with_sigkill_in_every_stage_and_run_again_gives_the_same_bytes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "killed/factors.safetensors").read_bytes() == (tmp_path / "whole/factors.safetensors").read_bytes()
