"""Layer and module of a tensor, parsed from its name, for the names of common architectures."""

from __future__ import annotations

import pytest

from taskvec.names import layer_and_module


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 3, "self_attn.q_proj"),
        ("model.layers.12.self_attn.q_proj.bias", 12, "self_attn.q_proj.bias"),
        ("transformer.h.0.attn.c_attn.weight", 0, "attn.c_attn"),
        ("h.11.mlp.c_fc.weight", 11, "mlp.c_fc"),
        ("bert.encoder.layer.7.attention.self.query.weight", 7, "attention.self.query"),
        ("model.layers.2.block_sparse_moe.experts.5.w1.weight", 2, "block_sparse_moe.experts.*.w1"),
        ("model.layers.2.experts.10.parts.3.bias", 2, "experts.*.parts.*.bias"),
        ("model.layers.2.experts.10.weight", 2, "experts.*"),
        ("0.weight", 0, "weight"),
        ("model.embed_tokens.weight", None, "model.embed_tokens"),
        ("lm_head.weight", None, "lm_head"),
        ("model.norm.weight", None, "model.norm"),
        ("conv1.weight", None, "conv1"),
        ("classifier.2", None, "classifier.2"),
        ("", None, ""),
    ],
)
def test_layer_and_module(name: str, layer: int | None, module: str) -> None:
    assert layer_and_module(name) == (layer, module)
