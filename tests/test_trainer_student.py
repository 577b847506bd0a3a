"""Students pruned in depth: which blocks go, and that what is left computes what it must."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainer_tiny import make_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from fastkd.trainer.config import StudentConfig
from fastkd.trainer.models import load_model
from fastkd.trainer.student import block_influence, build_student, choose_blocks, prune_depth, pruned_config

ROWS = torch.arange(40).view(2, 20) + 7


@pytest.fixture
def teacher(tmp_path: Path):
    return load_model("teacher.path", str(make_model(tmp_path / "teacher", blocks=7))).eval()


def silence(model, block: int) -> None:
    """Make a block add nothing to its input."""
    with torch.no_grad():
        model.model.layers[block].self_attn.o_proj.weight.zero_()
        model.model.layers[block].mlp.down_proj.weight.zero_()


def test_influence_of_a_silent_block_is_zero_and_agrees_with_hidden_states(teacher) -> None:
    silence(teacher, 3)
    influence = block_influence(teacher, ROWS)
    assert len(influence) == 7 and abs(influence[3]) < 1e-6
    with torch.no_grad():
        states = teacher.model(input_ids=ROWS, output_hidden_states=True).hidden_states
    for block in (0, 2, 4):  # the last state is after the final norm
        cosine = torch.cosine_similarity(states[block], states[block + 1], dim=-1).mean().item()
        assert influence[block] == pytest.approx(1 - cosine, abs=1e-5)
        assert influence[block] > 1e-4


def test_first_two_and_last_blocks_always_stay() -> None:
    influence = [0.0, 0.0, 0.5, 0.1, 0.3, 0.2, 0.0]
    assert choose_blocks(influence, 6) == [0, 1, 2, 4, 5, 6]
    assert choose_blocks(influence, 4) == [0, 1, 2, 6]
    assert choose_blocks(influence, 3) == [0, 1, 6]


@pytest.mark.parametrize("keep", [2, 7, 0, -1])
def test_impossible_depths_are_refused(keep: int) -> None:
    with pytest.raises(ValueError, match=rf"keep_blocks={keep}; allowed: 3 to 6 for a teacher of 7 blocks"):
        choose_blocks([0.0] * 7, keep)


def test_removing_a_silent_block_changes_nothing(teacher, tmp_path: Path) -> None:
    silence(teacher, 3)
    student = build_student(StudentConfig(keep_blocks=6, calibration_rows=2), teacher, ROWS).eval()
    assert student.config.num_hidden_layers == 6
    with torch.no_grad():
        expected = teacher(input_ids=ROWS).logits
        assert torch.equal(student(input_ids=ROWS).logits, expected)
        student.save_pretrained(tmp_path / "student")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
        assert torch.equal(again(input_ids=ROWS).logits, expected)
        # Blocks know their number for the cache of keys and values: generation with and without it must agree.
        assert torch.equal(
            again.generate(ROWS, max_new_tokens=5, do_sample=False, pad_token_id=0),
            teacher.generate(ROWS, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False),
        )


def test_the_student_shares_no_memory_with_the_teacher(teacher) -> None:
    student = prune_depth(teacher, [0, 1, 6])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(p.abs().sum() > 0 for p in teacher.parameters())


def test_settings_that_come_one_a_block_are_pruned_too() -> None:
    config = Gemma2Config(
        num_hidden_layers=4, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=50, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    smaller = pruned_config(config, [0, 1, 3])
    assert smaller.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert config.num_hidden_layers == 4 and len(config.layer_types) == 4
    torch.manual_seed(0)
    student = prune_depth(Gemma2ForCausalLM(config), [0, 1, 3])
    assert student(input_ids=ROWS).logits.shape == (2, 20, 50)


def test_frozen_embeddings(teacher) -> None:
    student = build_student(StudentConfig(keep_blocks=4, freeze_embeddings=True), teacher, ROWS)
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}  # tied with the head
