"""The head of a model as the fused losses take it: a weight, a bias, a softcap, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..cache import Head


def final_hidden(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """``(B, S, H)`` what goes into the head."""
    return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state


@torch.no_grad()
def find_head(model: PreTrainedModel, input_ids: Tensor) -> Head | None:
    """The head, if the model's logits are it applied to the final hidden states and nothing more; else None.

    Some architectures scale their logits, or wrap the head; what was found is therefore compared with the logits.

    Args:
        model: left in the mode (train or eval) it was in.
        input_ids: ``(1, S)`` any tokens, on its device.
    """
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear:
        return None
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    was_training = model.training
    model.eval()
    logits = model(input_ids=input_ids, use_cache=False).logits
    again = linear(final_hidden(model, input_ids))
    model.train(was_training)
    if softcap is not None:
        again = softcap * torch.tanh(again / softcap)
    plain = again.shape == logits.shape and torch.allclose(again, logits, rtol=1e-3, atol=1e-3)
    return Head(linear.weight, linear.bias, softcap) if plain else None
