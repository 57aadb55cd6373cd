"""A student for a BERT: DistilBERT (Sanh et al., arXiv:1910.01108) starts as every other layer of its teacher."""

from collections.abc import Sequence
from typing import Any


def distilbert_from(teacher: Any, layers: Sequence[int]) -> Any:
    """A `transformers.DistilBertForMaskedLM` that starts as some layers of a `BertForMaskedLM`, as DistilBERT did with 0, 2, 4,
    ...: its embeddings, these layers in this order, its head.

    DistilBERT has no token types: type 0 goes into the positions, so that all layers together give the teacher's logits.
    Its modules are `distilbert.transformer.layer.0` (hidden) and `distilbert.transformer.layer.0.attention` where the
    teacher's are `bert.encoder.layer.0` and `bert.encoder.layer.0.attention.self`.
    Raises ImportError without Transformers, TypeError for another teacher, ValueError for a layer that it does not have.
    """
    try:
        from transformers import BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM
    except ImportError as error:
        raise ImportError("distilbert_from needs Transformers: pip install 'commpress[transformers]'") from error
    if not isinstance(teacher, BertForMaskedLM):
        raise TypeError(f"distilbert_from: expected a transformers.BertForMaskedLM, got {type(teacher).__name__}")
    c = teacher.config
    unknown = [layer for layer in layers if not 0 <= layer < c.num_hidden_layers]
    if unknown or not layers:
        raise ValueError(
            f"distilbert_from(layers={list(layers)}): expected some of the teacher's layers 0 to {c.num_hidden_layers - 1}, "
            f"got {unknown or 'none'}"
        )
    config = DistilBertConfig(
        vocab_size=c.vocab_size,
        max_position_embeddings=c.max_position_embeddings,
        n_layers=len(layers),
        n_heads=c.num_attention_heads,
        dim=c.hidden_size,
        hidden_dim=c.intermediate_size,
        dropout=c.hidden_dropout_prob,
        attention_dropout=c.attention_probs_dropout_prob,
        activation=c.hidden_act,
        initializer_range=c.initializer_range,
        pad_token_id=c.pad_token_id,
        tie_word_embeddings=c.tie_word_embeddings,
        attn_implementation=c._attn_implementation,
    )
    state = teacher.state_dict()
    embeddings = "bert.embeddings."
    taken = {
        f"distilbert.embeddings.{name}": state[embeddings + name]
        for name in ("word_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")
    }
    taken["distilbert.embeddings.position_embeddings.weight"] = (
        state[embeddings + "position_embeddings.weight"] + state[embeddings + "token_type_embeddings.weight"][0]
    )
    for i, layer in enumerate(layers):
        for theirs, mine in _BERT_LAYER.items():
            for part in ("weight", "bias"):
                name = f"bert.encoder.layer.{layer}.{theirs}.{part}"
                taken[f"distilbert.transformer.layer.{i}.{mine}.{part}"] = state[name]
    for theirs, mine in _BERT_HEAD.items():
        for part in ("weight", "bias"):
            taken[f"{mine}.{part}"] = state[f"cls.predictions.{theirs}.{part}"]
    student = DistilBertForMaskedLM(config).to(teacher.device, teacher.dtype)
    student.load_state_dict(taken)
    return student


_BERT_LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
_BERT_HEAD = {
    "transform.dense": "vocab_transform",
    "transform.LayerNorm": "vocab_layer_norm",
    "decoder": "vocab_projector",
}
