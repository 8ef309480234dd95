"""Multi-token prediction against `transformers` and against equations 21 to 25 of DeepSeek-V3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    LENGTH,
    VOCAB,
    logit_error,
    oracle_model,
    our_model,
    random_tokens,
    randomise,
    relative,
    spec_of,
    v3,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.generation.candidate_generator import MTPCandidateGenerator
from transformers.modeling_layers import MtpModel

from whalepod.models.rope import tables
from whalepod.models.transformer import Losses, Transformer, target_windows

TOLERANCE = 5e-5


def with_mtp(depths: int) -> tuple[Any, Any, Transformer]:
    """transformers' model, its MTP layers, and whalepod's model with the weights of both."""
    config = v3(num_nextn_predict_layers=depths)
    reference = oracle_model(config)
    drafter = MtpModel(reference, depths)
    randomise(drafter.layers, seed=20)
    model = our_model(reference, config)
    ours = model.mtp.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in drafter.layers.state_dict().items():
            own = name.replace("mtp_block.", "block.").replace("post_norm.", "norm.")
            own = own.replace("experts.gate_up_proj", "experts.gate_up")
            own = own.replace("mlp.experts.down_proj", "mlp.experts.down")
            target = ours.pop(own)
            target.copy_(tensor.view_as(target))
    assert not ours
    return reference, drafter.eval(), model.eval()


def depth_states(model: Transformer, tokens: Tensor, following: Tensor) -> list[Tensor]:
    """Hidden states of the main model and of every depth: what `forward` gives to the head."""
    seen: list[Tensor] = []
    hooks = [
        part.register_forward_hook(lambda _m, _a, out: seen.append(out)) for part in (model.norm, *model.mtp)
    ]
    model(tokens, target_windows(following, len(model.mtp)))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("depths", [1, 2])
def test_logits_of_every_depth(depths: int) -> None:
    reference, drafter, model = with_mtp(depths)
    sequence = random_tokens(1, LENGTH + depths)
    tokens, following = sequence[:, :LENGTH], sequence[:, 1:]
    # One token more than the embeddings need: the target of the last depth.
    following = torch.cat((following, random_tokens(1, 1, seed=3)), dim=1)
    with torch.no_grad():
        ours = [model.lm_head(h) for h in depth_states(model, tokens, following)]
        hidden = reference.model(tokens).last_hidden_state
        assert logit_error(ours[0], reference.lm_head(hidden)) < TOLERANCE
        cache = MtpCache(config=reference.config.get_mtp_config())
        for depth in range(1, depths + 1):
            # transformers counts positions by the embedded token; only distances matter.
            positions = torch.arange(depth, depth + LENGTH)[None]
            ids = sequence[:, depth : depth + LENGTH]
            hidden = drafter.forward_layer(depth - 1, hidden, positions, cache, input_ids=ids)
            assert logit_error(ours[depth], drafter.shared_head(hidden)) < TOLERANCE


@pytest.mark.parametrize("depths", [1, 2])
def test_drafts_of_generate(depths: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own speculative loop, from a checkpoint on disk, drafts the tokens that we do."""
    reference, drafter, model = with_mtp(depths)
    save_checkpoint(reference, drafter, tmp_path)
    first = reference.config.num_hidden_layers
    monkeypatch.setattr(
        DeepseekV3ForCausalLM,
        "_keys_to_ignore_on_load_unexpected",
        [rf"model\.layers\.{first + k}\." for k in range(depths)],
    )
    loaded = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    drafts: list[list[int]] = []
    original = MTPCandidateGenerator.get_candidates

    def recorded(self: MTPCandidateGenerator, *args: Any, **kwargs: Any) -> Any:
        ids, logits = original(self, *args, **kwargs)
        if logits is not None:
            drafts.append(ids[0].tolist())
        return ids, logits

    monkeypatch.setattr(MTPCandidateGenerator, "get_candidates", recorded)
    prompt = random_tokens(1, 8)
    out = loaded.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        use_mtp=True,
        pad_token_id=0,
    )
    plain = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert out.tolist() == plain.tolist()
    assert len(drafts) >= 4
    for ids in drafts:
        known, drafted = ids[:-depths], ids[-depths:]
        assert draft(model, torch.tensor([known]), depths) == drafted


@torch.no_grad()
def draft(model: Transformer, known: Tensor, depths: int) -> list[int]:
    """Greedy drafts after `known`, whose last token the main model has not read yet."""
    tokens, following = known[:, :-1], known[:, 1:]
    cos_sin = tables(model.spec.rope, 16, torch.arange(tokens.shape[1]))
    hidden = model.hidden(tokens, None, lambda part, q, kv: part.absorbed(q, kv, None))
    drafted = []
    for depth in range(depths):
        hidden = model.mtp[depth](hidden, model.embed_tokens(following), cos_sin)
        token = model.lm_head(hidden[:, -1:]).argmax(-1)
        drafted.append(int(token))
        following = torch.cat((following[:, 1:], token), dim=1)
    return drafted


def save_checkpoint(reference: Any, drafter: nn.Module, folder: Path) -> None:
    """In the hub's form: MTP layers after the last, experts one by one."""
    first = reference.config.num_hidden_layers
    tensors = dict(reference.state_dict())
    for name, tensor in drafter.layers.state_dict().items():
        depth, rest = name.split(".", 1)
        rest = rest.replace("mtp_block.", "").replace("post_norm.", "shared_head.norm.")
        tensors[f"model.layers.{first + int(depth)}.{rest}"] = tensor
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                for part, weight in zip(("gate", "up"), both.chunk(2), strict=True):
                    out[name.replace("gate_up_proj", f"{e}.{part}_proj.weight")] = weight.contiguous()
        elif name.endswith("experts.down_proj"):
            for e, weight in enumerate(tensor):
                out[name.replace("down_proj", f"{e}.down_proj.weight")] = weight.contiguous()
        else:
            out[name] = tensor.contiguous()
    reference.config.save_pretrained(folder)
    save_file({n: t.clone() for n, t in out.items()}, folder / "model.safetensors", {"format": "pt"})


def losses(model: Transformer, tokens: Tensor, targets: Tensor) -> Losses:
    out = model(tokens, target_windows(targets, len(model.mtp)))
    assert isinstance(out, Losses)
    return out


def equations(model: Transformer, tokens: Tensor, text: list[int]) -> list[Tensor]:
    """V3, equations 21 to 24 for one sequence t_1, t_2, ... = `text`, summed over the positions i.

    The main model reads `tokens`, the beginning of the text. A negative t is a target that does
    not count. Returns the loss of the next token, then of every depth. Only the blocks (TRM) and
    the main model are whalepod's own; they have tests of their own.
    """
    t = [0, *text]  # so that t[1] is the first
    length = len(tokens)
    h = model.hidden(tokens[None], None, lambda part, q, kv: part.expanded(q, kv, None))[0]
    depths = [h]
    cos_sin = tables(model.spec.rope, 16, torch.arange(length))
    for k, module in enumerate(model.mtp, start=1):
        joined = []
        for i in range(1, length + 1):
            embedding = rms(model.embed_tokens.weight[max(t[i + k], 0)], module.enorm.weight)
            previous = rms(depths[-1][i - 1], module.hnorm.weight)
            joined.append(module.eh_proj.weight @ torch.cat((embedding, previous)))  # 21
        h = module.block(torch.stack(joined)[None], cos_sin)[0]  # 22
        depths.append(rms(h, module.norm.weight))
    losses = []
    for k, states in enumerate(depths):
        total = torch.zeros(())
        for i in range(1, length + 1):
            if (target := t[i + k + 1]) >= 0:
                p = (model.lm_head.weight @ states[i - 1]).softmax(0)  # 23
                total = total - p[target].log()  # 24
        losses.append(total)
    return losses


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


@pytest.mark.parametrize("ignored", [(), (4,), (0, 9, 10), (11, 12)], ids=str)
@pytest.mark.parametrize("depths", [1, 2])
def test_losses_equal_the_equations(depths: int, ignored: tuple[int, ...]) -> None:
    """Value and gradients, with targets that do not count anywhere in the sequence and past it."""
    model = Transformer(spec_of(v3(num_nextn_predict_layers=depths)))
    randomise(model, seed=21)
    model.eval()
    length = 12
    sequences = random_tokens(2, length + 1 + depths)
    tokens, targets = sequences[:, :length], sequences[:, 1:].clone()
    for position in ignored:
        targets[1, position] = -100
    ours = losses(model, tokens, targets)
    assert len(ours.mtp) == depths
    texts = torch.cat((tokens[:, :1], targets), dim=1).tolist()
    by_sequence = [equations(model, row, text) for row, text in zip(tokens, texts, strict=True)]
    expected = [torch.stack(parts).sum() for parts in zip(*by_sequence, strict=True)]
    for value, wanted in zip((ours.main, *ours.mtp), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=0)

    # 25: the total is main + lambda / D times the sum of the depths'.
    weight = 0.3 / depths
    grads = gradients_of(model, ours.main + weight * torch.stack(ours.mtp).sum())
    wanted = gradients_of(model, expected[0] + weight * torch.stack(expected[1:]).sum())
    for name, grad in grads.items():
        assert relative(grad, wanted[name]) < 5e-5, name


def gradients_of(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_embedding_and_head_learn_from_both_losses() -> None:
    model = Transformer(spec_of(v3(num_nextn_predict_layers=1)))
    randomise(model, seed=22)
    sequence = random_tokens(2, LENGTH + 2)
    tokens, targets = sequence[:, :-2], sequence[:, 1:]

    main = gradients_of(model, losses(model, tokens, targets).main)
    mtp = gradients_of(model, losses(model, tokens, targets).mtp[0])
    both = losses(model, tokens, targets)
    together = gradients_of(model, both.main + both.mtp[0])
    for name in ("embed_tokens.weight", "lm_head.weight", "layers.0.self_attn.o_proj.weight"):
        assert main[name].norm() > 0
        assert mtp[name].norm() > 0
        assert relative(together[name], main[name] + mtp[name]) < 1e-5
    assert not any(name.startswith("mtp.") for name in main)
    assert {n for n, _ in model.named_parameters() if n.startswith("mtp.")} <= mtp.keys()


def test_ignored_targets_count_in_no_loss() -> None:
    model = Transformer(spec_of(v3(num_nextn_predict_layers=2)))
    randomise(model, seed=23)
    tokens = random_tokens(1, LENGTH)
    nothing = losses(model, tokens, torch.full((1, LENGTH + 2), -100))
    assert [x.item() for x in (nothing.main, *nothing.mtp)] == [0.0, 0.0, 0.0]
    (nothing.main + sum(nothing.mtp)).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_main_loss_is_cross_entropy_of_the_logits() -> None:
    model = Transformer(spec_of(v3(num_nextn_predict_layers=1)))
    randomise(model, seed=24)
    tokens, targets = random_tokens(2, LENGTH), random_tokens(2, LENGTH + 1, seed=25)
    targets[0, :5] = -100
    with torch.no_grad():
        logits = model(tokens)
        expected = F.cross_entropy(
            logits.reshape(-1, VOCAB), targets[:, :LENGTH].flatten(), ignore_index=-100, reduction="sum"
        )
        torch.testing.assert_close(losses(model, tokens, targets).main, expected, rtol=1e-5, atol=0)
